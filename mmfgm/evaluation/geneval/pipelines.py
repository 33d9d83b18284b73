# Copyright (c) mmfgm authors.
"""Images from a diffusers pipeline, each from its own seed, with the network's evaluations
counted."""

import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from mmfgm.errors import UsageError
from mmfgm.models import fingerprint
from mmfgm.models.families import diffusers_module, load_or_explain, quiet
from mmfgm.registry import TASK_UTILS

DTYPES = ('float32', 'float16', 'bfloat16')


@TASK_UTILS.register_module()
class DiffusersPipeline:
    """A text-to-image pipeline of diffusers as a config describes it; loaded by :meth:`load`.

    Args:
        pretrained (str): Hub id or local folder.
        call (dict): Arguments of the pipeline's call, such as ``num_inference_steps``,
            ``guidance_scale``, ``height`` and ``width``.
        dtype (str): ``'float16'``, ``'bfloat16'`` or ``'float32'``. Defaults to ``'float16'``.
        load_args (dict, optional): For ``from_pretrained``, such as ``text_encoder_3=None``,
            ``variant`` or ``revision``.
        scheduler (dict, optional): ``dict(type=...)``, a scheduler of diffusers, built from the
            pipeline's own scheduler config and what else is given here. Defaults to the pipeline's
            own.
        lora (dict, optional): ``dict(pretrained=..., weight_name=..., scale=1.0)`` in diffusers'
            format, loaded and fused by the pipeline's own methods.
        peft (str, optional): Hub id or folder of a PEFT adapter of the transformer, which is
            merged.
        batch_size (int): Images in one call. Defaults to 4.

    Attributes:
        nfe (int, optional): Calls of the denoising network in the last call of the pipeline.
    """

    def __init__(
        self,
        pretrained: str,
        call: dict,
        dtype: str = 'float16',
        load_args: dict | None = None,
        scheduler: dict | None = None,
        lora: dict | None = None,
        peft: str | None = None,
        batch_size: int = 4,
    ):
        if dtype not in DTYPES:
            raise UsageError(f'pipeline.dtype must be one of {", ".join(DTYPES)}, but is {dtype!r}')
        if batch_size < 1:
            raise UsageError(f'pipeline.batch_size must be at least 1, but is {batch_size}')
        if lora is not None and 'pretrained' not in lora:
            raise UsageError(
                f'pipeline.lora must name a hub id or folder as pretrained, but is {dict(lora)}'
            )
        if scheduler is not None and not hasattr(diffusers_module(), scheduler.get('type', '')):
            raise UsageError(
                f'diffusers {diffusers_module().__version__} has no scheduler'
                f' {scheduler.get("type")!r}, which pipeline.scheduler.type names; choose'
                ' another'
            )
        self.pretrained = pretrained
        self.call = dict(call)
        self.dtype = dtype
        self.batch_size = batch_size
        self.load_args = dict(load_args or {})
        self.scheduler = scheduler
        self.lora = lora
        self.peft = peft
        self.nfe: int | None = None

    def load(self, device) -> 'DiffusersPipeline':
        """Load the pipeline onto a device; returns itself.

        Raises:
            UsageError: If a part cannot be had.
        """
        diffusers = diffusers_module()
        quiet()
        self.pipeline = load_or_explain(
            lambda: diffusers.DiffusionPipeline.from_pretrained(
                self.pretrained, torch_dtype=getattr(torch, self.dtype), **self.load_args
            ),
            self.pretrained,
            'pipeline',
        )
        components = self.pipeline.components
        self.network = components.get('transformer') or components.get('unet')
        if self.network is None:
            raise UsageError(
                f'{type(self.pipeline).__name__} has neither a transformer nor a unet, whose calls'
                ' are counted; name a pipeline with one'
            )
        if self.lora:
            self._fuse(**self.lora)
        if self.peft:
            self._merge()
        if self.scheduler:
            cls = getattr(diffusers, self.scheduler['type'])
            changes = {key: value for key, value in self.scheduler.items() if key != 'type'}
            self.pipeline.scheduler = cls.from_config(self.pipeline.scheduler.config, **changes)
        known = inspect.signature(type(self.pipeline).__call__).parameters
        unknown = [key for key in self.call if key not in known]
        if unknown:
            raise UsageError(
                f'{type(self.pipeline).__name__} takes no {", ".join(unknown)}, which pipeline.call'
                ' sets; leave it out'
            )
        self.pipeline.set_progress_bar_config(disable=True)
        self.pipeline.to(device)
        return self

    def _fuse(self, pretrained: str, weight_name: str | None = None, scale: float = 1.0) -> None:
        load_or_explain(
            lambda: self.pipeline.load_lora_weights(pretrained, weight_name=weight_name),
            pretrained,
            'LoRA',
        )
        self.pipeline.fuse_lora(lora_scale=scale)
        self.pipeline.unload_lora_weights()

    def _merge(self) -> None:
        try:
            from peft import PeftModel
        except ImportError as e:
            raise UsageError(
                f'pipeline.peft needs peft ({e}); install it: pip install "mmfgm[sd3]"'
            ) from e
        adapted = load_or_explain(
            lambda: PeftModel.from_pretrained(self.network, self.peft), self.peft, 'PEFT adapter'
        )
        adapted.merge_and_unload()

    @property
    def identity(self) -> dict[str, Any]:
        """What the images depend on beside prompt and seed: settings and weights, which must be
        loaded."""
        weights = {
            name: fingerprint(part)
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module)
        }
        scheduler = self.pipeline.scheduler
        return dict(
            weights=weights,
            dtype=self.dtype,
            call=self.call,
            scheduler=dict(
                type=type(scheduler).__name__,
                **{k: v for k, v in scheduler.config.items() if k[0] != '_'},
            ),
        )

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], seeds: Sequence[int]) -> list[np.ndarray]:
        """Images ``(H, W, 3)`` uint8 RGB, one for each prompt; its noise depends on its own seed
        alone."""
        # on the CPU, so that a seed means the same noise on every device
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        calls = []
        handle = self.network.register_forward_hook(lambda *args: calls.append(None))
        scheduler = self.pipeline.scheduler
        step = self.pipeline.scheduler.step
        # SD3's pipeline lets a stochastic scheduler draw from the global generator
        if 'generator' in inspect.signature(step).parameters:
            scheduler.step = partial(step, generator=generators)
        try:
            images = self.pipeline(
                list(prompts), generator=generators, output_type='np', **self.call
            ).images
        finally:
            handle.remove()
            scheduler.__dict__.pop('step', None)
        self.nfe = len(calls)
        # as diffusers' numpy_to_pil
        return [(image * 255).round().astype('uint8') for image in images]
