# Copyright (c) mmfgm authors.

import torch
from torch import Tensor, nn


class OneStepGenerator(nn.Module):
    """``x_0 = c_skip z - c_out v(c_in z, t*)`` (Eq. B.1): one network call from noise to data.

    The defaults are the usual choice ``t* = 1``; the paper's SD3 generator (Eq. B.2) is
    ``t_star=0.97, c_in=0.8``, and its ablation C.1 is ``c_out=1`` with ``t_star`` in [0, 1]. Eq.
    5.1 is printed for the opposite sign of the velocity; in ours it is ``c_skip = c_out = c_in =
    t*``, one denoising step of the teacher from ``t*``.

    Args:
        network (nn.Module): The velocity network, usually a copy of the teacher's.
        t_star (float): The fixed time the network is called at, in [0, 1]. Defaults to 1.
        c_skip (float): Defaults to 1.
        c_out (float, optional): Defaults to ``t_star``.
        c_in (float): Defaults to 1.

    Raises:
        ValueError: If ``t_star`` is outside [0, 1], or ``c_out`` is 0.
    """

    def __init__(
        self,
        network: nn.Module,
        t_star: float = 1.0,
        c_skip: float = 1.0,
        c_out: float | None = None,
        c_in: float = 1.0,
    ):
        super().__init__()
        if not 0 <= t_star <= 1:
            raise ValueError(f't_star must lie in [0, 1] (0 is data, 1 is noise), but got {t_star}')
        self.t_star = t_star
        self.c_skip = c_skip
        self.c_out = t_star if c_out is None else c_out
        self.c_in = c_in
        if self.c_out == 0:
            raise ValueError(
                f'c_out is 0 (t_star={t_star}, c_out={c_out}), so the network could not change the '
                'output; set c_out, for example to 1 as in the ablation C.1 of the paper'
            )
        self.network = network

    def forward(self, z: Tensor, **cond) -> Tensor:
        """Map noise ``z (N, *event)`` to samples ``x_0 (N, *event)``."""
        t = torch.full((len(z),), self.t_star, device=z.device)
        return self.c_skip * z - self.c_out * self.network(self.c_in * z, t, **cond)
