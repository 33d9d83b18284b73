# Copyright (c) mmfgm authors.
"""What the makers of GPUs say about them, and how much of it a training is assumed to reach."""

from dataclasses import dataclass

import torch

from mmfgm.errors import UsageError

GIB = 1 << 30
# Assumed and not measured: the parts of the data sheets' numbers that a training reaches.
EFFICIENCY = dict(compute=0.5, memory=0.8, link=0.7)
# What the CUDA context takes, and the part of the rest for workspaces and fragmentation.
CONTEXT_GIB = 1.0
RESERVE = 0.1
# Seconds that a collective takes beside its bytes, once, for each hop of its ring inside a machine
# and for each between two: those by which NCCL chooses its algorithms (tuning.cc: ring, Simple,
# NVLink and network).
RING_START, RING_HOP, RING_HOP_BETWEEN = 8.4e-6, 3.4e-6, 14e-6


@dataclass(frozen=True)
class GPU:
    """Data sheet of a GPU.

    Args:
        gib (float): Memory, as torch.cuda reports it.
        bf16_tflops (float): Peak of dense matrix products in bf16 with sums in float32.
        tf32_tflops (float), fp32_tflops (float): The same of float32 inputs, with and without
            rounding them to TF32.
        memory_gb_s (float): Bandwidth of its memory.
        link_gb_s (float): Bandwidth to its neighbours, in one direction.
        link (str): What the link is.
        network_gb_s (float): Bandwidth of its share of a machine's network cards, in one direction.
        network (str): What that is taken to be.
    """

    gib: float
    bf16_tflops: float
    tf32_tflops: float
    fp32_tflops: float
    memory_gb_s: float
    link_gb_s: float
    link: str
    network_gb_s: float = 1.5625
    network: str = '100 Gbit/s for 8 GPUs'

    @property
    def usable_bytes(self) -> float:
        return (self.gib - CONTEXT_GIB) * (1 - RESERVE) * GIB

    def flops_per_second(self, dtype: torch.dtype, tf32: bool) -> float:
        """Assumed speed of matrix products of a type."""
        if dtype in (torch.bfloat16, torch.float16):
            peak = self.bf16_tflops
        else:
            peak = self.tf32_tflops if tf32 else self.fp32_tflops
        return 1e12 * peak * EFFICIENCY['compute']

    @property
    def bytes_per_second(self) -> float:
        return 1e9 * self.memory_gb_s * EFFICIENCY['memory']

    @property
    def link_bytes_per_second(self) -> float:
        return 1e9 * self.link_gb_s * EFFICIENCY['link']

    @property
    def network_bytes_per_second(self) -> float:
        return 1e9 * self.network_gb_s * EFFICIENCY['link']


GPUS = {
    'A100-40GB': GPU(39.4, 312, 156, 19.5, 1555, 300, 'NVLink 3', 25, '200 Gbit/s a GPU'),
    'A100-80GB': GPU(79.1, 312, 156, 19.5, 2039, 300, 'NVLink 3', 25, '200 Gbit/s a GPU'),
    'L40S-48GB': GPU(44.4, 362, 183, 91.6, 864, 32, 'PCIe 4.0 x16'),
    'RTX3090-24GB': GPU(23.6, 71, 35.6, 35.6, 936, 32, 'PCIe 4.0 x16'),
    'L4-24GB': GPU(22.0, 121, 60, 30.3, 300, 32, 'PCIe 4.0 x16'),
    'RTX4090-24GB': GPU(23.6, 165, 82.6, 82.6, 1008, 32, 'PCIe 4.0 x16'),
    'H100-80GB': GPU(79.1, 989, 494, 67, 3350, 450, 'NVLink 4', 50, '400 Gbit/s a GPU'),
    'H200-141GB': GPU(139.7, 989, 494, 67, 4800, 450, 'NVLink 4', 50, '400 Gbit/s a GPU'),
}


def gpu_named(name: str) -> GPU:
    """The data sheet of a GPU.

    Raises:
        UsageError: If it is unknown.
    """
    if name not in GPUS:
        raise UsageError(f'expected --gpu to be one of {", ".join(GPUS)}, found {name!r}')
    return GPUS[name]
