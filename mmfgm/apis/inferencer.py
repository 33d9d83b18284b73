# Copyright (c) mmfgm authors.
import copy
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.infer import BaseInferencer
from mmengine.registry import DefaultScope
from mmengine.structures import BaseDataElement
from torch import Tensor

from mmfgm.config import resolve
from mmfgm.datasets import collate
from mmfgm.errors import UsageError
from mmfgm.models import Sampling, choose_precision
from mmfgm.models.families import Family, family_named, family_of
from mmfgm.registry import TASK_UTILS

from .artifacts import check_weights, is_export, read_export
from .config import read_config, weights_of
from .sampling_model import SamplingModel
from .values import OUT_TYPES, as_seeds, convert, draw_grid, is_int

Inputs = int | str | Sequence[int] | Sequence[str] | np.ndarray | Tensor


class FGMInferencer(BaseInferencer):
    """Samples of a trained one-step generator, or of its teacher, in MMEngine's calling manner.

    Only the networks that are asked for are built and held: one generator, and the teacher once it
        is sampled. Calls from
    several threads take turns.

    Args:
        model (str | Config, optional): A config's path, ``mmfgm::PATH``, or the config itself; or
            the work dir of a run or the folder of an export, which need nothing else.
        weights (str, optional): A training checkpoint (``.pth``, sharded directory, work dir), a
            ``.safetensors`` file of ``tools/merge_checkpoint.py``, or an export's folder. Without
            it, only the teacher can be sampled.
        device (str, optional): Defaults to the GPU, if there is one.
        precision (str): ``'fp32'``; ``'bf16'`` for networks and text encoders that compute in bf16;
            or ``'auto'`` for the second where the device computes in it, else the first.
        text_encoder (dict, optional): Config of what encodes prompts. Defaults to the config's
            ``text_encoder``, or to the encoders of the pipeline at ``model.network.pretrained``;
            loaded when the first prompt comes.
        show_progress (bool): Show MMEngine's progress bar. Defaults to False.

    Raises:
        UsageError: If the config or the weights are missing, are of another kind, or do not fit
            each other.

    Examples:
        >>> inferencer = FGMInferencer('mmfgm::fgm/digits.py', 'work_dirs/fgm/digits')
        >>> images = inferencer([3, 1, 4], seeds=[0, 1, 2])['predictions']
    """

    preprocess_kwargs = {'seeds'}
    forward_kwargs = {'sampling'}
    visualize_kwargs = {'grid'}
    postprocess_kwargs = {'out'}

    def __init__(
        self,
        model: str | Config | dict | None = None,
        weights: str | None = None,
        device: str | None = None,
        precision: str = 'fp32',
        text_encoder: dict | None = None,
        show_progress: bool = False,
    ):
        if model is None and weights is None:
            raise UsageError(
                'FGMInferencer needs a config and a checkpoint, or the folder of an export'
            )
        if isinstance(model, str) and is_export(model):
            if weights is not None:
                raise UsageError(
                    f'{model!r} is an export, which holds its weights; leave {weights!r} out, or'
                    ' give a config first'
                )
            model, weights = None, model
        self.export = read_export(weights) if model is None or is_export(weights) else None
        if self.export is not None:
            check_weights(weights, self.export)
        if model is None:
            cfg = Config(dict(model=self.export['model']))
        else:
            cfg = (
                read_config(model) if isinstance(model, str) else Config(copy.deepcopy(dict(model)))
            )
            if isinstance(model, str):
                weights = weights_of(model, weights)
        resolve(cfg)
        if cfg.get('model') is None:
            raise UsageError(
                f'the config has no model, but {list(cfg)}; start from one of ours, for example '
                "'mmfgm::fgm/digits.py'"
            )
        if precision == 'auto':
            precision, _ = choose_precision(device or get_device())
        self.precision = precision
        self._lock = threading.Lock()
        self._encoded: tuple[tuple[str, ...], dict[str, Tensor]] = ((), {})
        self._empty: dict[str, Tensor] = {}
        self._family: Family | None = None
        self._encoder = None
        self._make_encoder = self._find_encoder(cfg, text_encoder)
        super().__init__(cfg, weights, device, scope='mmfgm', show_progress=show_progress)
        if self.model.num_classes is None and self._make_encoder is None:
            raise UsageError(
                'this network takes prompts, and nothing says how they are encoded: set'
                " text_encoder in the config, for example dict(type='WordEncoder')"
            )

    def _find_encoder(self, cfg: Config, named: dict | None) -> Callable[[], Any] | None:
        """Makes what encodes prompts, or None for a model without prompts.

        The config of the call, the export or the config names it; or else the family of the
        network has one.
        """
        named = named or (self.export or {}).get('text_encoder') or cfg.get('text_encoder')
        if named and 'family' not in named:
            return partial(TASK_UTILS.build, named)
        options = dict(dtype='bfloat16' if self.precision == 'bf16' else 'float32')
        if named:
            options.update(named)
            self._family = family_named(options.pop('family'))
        else:
            network = (self.export['model'] if self.export else cfg.model)['network']
            self._family = family_of(network.get('type'))
            options['pretrained'] = network.get('pretrained')
        if self._family is None or not options['pretrained']:
            return None
        return partial(self._family.encoder, **options)

    # what BaseInferencer builds
    def _init_model(self, cfg: Config, weights: str | None, device: str = 'cpu') -> SamplingModel:
        with DefaultScope.overwrite_default_scope(self.scope):
            null = self._empty_prompt if self._make_encoder else None
            model = SamplingModel(cfg.model, weights, self.export, self.precision, null, device)
            model.load(model.available[0])
        return model

    def _init_pipeline(self, cfg: Config):
        return lambda item: item  # nothing to read or resize: an input is a condition

    def _init_collate(self, cfg: Config):
        return collate

    def _init_visualizer(self, cfg: Config) -> None:
        return None  # the config's one writes to a training's work dir

    # what a caller may want to know
    @property
    def networks(self) -> list[str]:
        """Names of the networks that can be sampled, the default first."""
        return list(self.model.available)

    @property
    def condition(self) -> str:
        """What inputs are: ``'labels'``, ``'prompts'``, or ``'nothing'`` for a number of
        samples."""
        if self._make_encoder:
            return 'prompts'
        return 'labels' if self.model.num_classes else 'nothing'

    @property
    def num_classes(self) -> int:
        """0 if inputs are no labels."""
        return (self.model.num_classes or 0) if self.condition == 'labels' else 0

    @property
    def text_encoder(self) -> Any:
        """What encodes prompts, loaded at first use."""
        if self._encoder is None:
            with DefaultScope.overwrite_default_scope(self.scope):
                encoder = self._make_encoder()
            self._encoder = encoder.to(self.device) if hasattr(encoder, 'to') else encoder
        return self._encoder

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.model.device

    def default_sampling(self, network: str | None = None) -> Sampling:
        """How a network is sampled unless the call says otherwise.

        A generator takes as many calls as it has times; others do what the config's sample
        pictures or evaluations say, or else 50 Euler steps.
        """
        network = network or self.networks[0]
        if network in self.model.generators:
            return Sampling(network, self.model.generators[network])
        pictures = (self.cfg.get('default_hooks') or {}).get('samples') or {}
        named = [
            *(pictures.get('samplings') or {}).values(),
            *(
                entry['sampling']
                for entry in (self.cfg.get('evaluations') or {}).values()
                if 'sampling' in entry
            ),
        ]
        return next(
            (Sampling(**entry) for entry in named if entry['network'] == network),
            Sampling(network, 50),
        )

    def __call__(
        self,
        inputs: Inputs,
        seeds: int | Sequence[int] | None = None,
        batch_size: int = 8,
        network: str | None = None,
        nfe: int | None = None,
        solver: str | None = None,
        shift: float | None = None,
        guidance: float | None = None,
        spacing: str | None = None,
        guidance_channels: int | None = None,
        deterministic: bool | None = None,
        out: str = 'pil',
        grid: int = 0,
        return_datasamples: bool = False,
    ) -> dict[str, Any]:
        """Generate one sample for each input.

        Args:
            inputs: Labels in ``[0, num_classes - 1]``, prompts, or how many unconditional samples;
                see :attr:`condition`.
            seeds: One for each input, in [0, 2^32 - 1]; or the first one, the next input having the
                next seed. A sample depends on its own seed and input alone, and has the noise that
                evaluations give that seed. Defaults to 0.
            batch_size (int): Inputs per network call. Defaults to 8.
            network (str, optional): One of :attr:`networks`. Defaults to the first.
            nfe (int, optional): Network calls; see :class:`~mmfgm.models.Sampling`. Defaults, as
                the next six do, to that of :meth:`default_sampling`.
            solver (str, optional): ``'euler'`` or ``'heun'``.
            shift (float, optional): Of the time grid.
            guidance (float, optional): Scale of classifier-free guidance; 1 is none.
            spacing (str, optional): Of the times, see :class:`~mmfgm.models.Sampling`.
            guidance_channels (int, optional): Guide the first so many channels only.
            deterministic (bool, optional): Of a generator of few steps, see
                :class:`~mmfgm.models.Sampling`.
            out (str): ``'pil'``; ``'numpy'``, uint8 ``(H, W, C)``, or points as float32; or
                ``'tensor'``, float32 as the model makes them, images ``(C, H, W)`` in [-1, 1] up to
                overshoot, on the CPU. Defaults to ``'pil'``.
            grid (int): If positive, also draw all images in a grid with so many in a row.
            return_datasamples (bool): Return MMEngine's ``BaseDataElement`` with ``sample``, a
                tensor, and ``seed`` and ``label`` or ``prompt``, instead of what ``out`` says.

        Returns:
            dict: ``predictions``, a list in the order of the inputs; and ``visualization``, the
                grid as uint8
            ``(H, W, 3)``, or None.

        Raises:
            UsageError: If inputs, seeds or the sampling do not fit the model; before anything is
                generated.
        """
        if out not in OUT_TYPES:
            raise UsageError(f'out must be one of {OUT_TYPES}, but is {out!r}')
        given = {
            name: value
            for name, value in dict(
                nfe=nfe,
                solver=solver,
                shift=shift,
                guidance=guidance,
                spacing=spacing,
                guidance_channels=guidance_channels,
                deterministic=deterministic,
            ).items()
            if value is not None
        }
        sampling = self.default_sampling(network).but(**given)
        with self._lock:
            return super().__call__(
                inputs,
                return_datasamples,
                batch_size,
                seeds=seeds,
                sampling=sampling,
                grid=grid,
                out=out,
            )

    def check_inputs(self, inputs: Inputs) -> list:
        """Labels, prompts, or None for each unconditional sample.

        Raises:
            UsageError: If inputs are not what the model takes.
        """
        if self.condition == 'nothing':
            if not is_int(inputs) or inputs < 1:
                raise UsageError(
                    'this model has neither classes nor prompts: give the number of samples, at'
                    f' least 1, not {inputs!r}'
                )
            return [None] * int(inputs)
        items = inputs.tolist() if isinstance(inputs, (np.ndarray, Tensor)) else inputs
        items = list(items) if isinstance(items, (list, tuple, range)) else [items]
        if not items:
            raise UsageError('there are no inputs; give at least one')
        if self.condition == 'labels':
            wrong = [item for item in items if not is_int(item) or not 0 <= item < self.num_classes]
            if wrong:
                raise UsageError(
                    'this model has classes: inputs are whole numbers in [0,'
                    f' {self.num_classes - 1}], not {wrong[0]!r}'
                )
            return [int(item) for item in items]
        wrong = [item for item in items if not isinstance(item, str)]
        if wrong:
            raise UsageError(f'this model takes prompts: inputs are texts, not {wrong[0]!r}')
        self.text_encoder.check(items)
        return items

    # the steps of BaseInferencer's call
    def _inputs_to_list(self, inputs: Inputs) -> list:
        return self.check_inputs(inputs)

    def preprocess(
        self, inputs: list, batch_size: int = 1, seeds: int | Sequence[int] | None = None
    ) -> list[dict]:
        """Batches ``dict(idx, seed, [labels | prompt])`` of inputs that :meth:`check_inputs` made.

        Raises:
            UsageError: If there is not one seed for each input, or ``batch_size`` is not positive.
        """
        if batch_size < 1:
            raise UsageError(f'batch_size must be at least 1, but is {batch_size}')
        seeds = as_seeds(seeds, len(inputs))
        key = dict(labels='labels', prompts='prompt').get(self.condition)
        items = [
            dict(idx=idx, seed=seed, **({key: value} if key else {}))
            for idx, (value, seed) in enumerate(zip(inputs, seeds))
        ]
        return [
            self.collate_fn(chunk)
            for chunk in self._get_chunk_data(map(self.pipeline, items), batch_size)
        ]

    @torch.no_grad()
    def forward(self, inputs: dict, sampling: Sampling) -> list[BaseDataElement]:
        """Generate a batch: data samples with ``sample`` on the CPU, and their seeds and conditions
        as metadata."""
        with DefaultScope.overwrite_default_scope(self.scope):
            self.model.load(sampling.network)
        cond = {'labels': inputs['labels']} if 'labels' in inputs else {}
        if 'prompt' in inputs:
            cond = self._encode(tuple(inputs['prompt']))
        batch = dict(idx=inputs['idx'], seed=inputs['seed'], cond=cond)
        samples = self.model.sample(batch, sampling).cpu()
        meta = [dict(seed=int(seed)) for seed in inputs['seed']]
        for name, key in dict(labels='label', prompt='prompt').items():
            for entry, value in zip(meta, inputs.get(name, ())):
                entry[key] = int(value) if name == 'labels' else value
        return [
            BaseDataElement(metainfo=entry, sample=sample) for entry, sample in zip(meta, samples)
        ]

    def visualize(
        self, inputs: list, preds: list[BaseDataElement], grid: int = 0
    ) -> np.ndarray | None:
        """All images in a grid with ``grid`` in a row, uint8 ``(H, W, 3)``; None for 0."""
        return draw_grid([pred.sample for pred in preds], grid) if grid else None

    def postprocess(
        self,
        preds: list[BaseDataElement],
        visualization: np.ndarray | None,
        return_datasamples: bool = False,
        out: str = 'pil',
    ) -> dict[str, Any]:
        """The call's result."""
        if not return_datasamples:
            preds = [convert(pred.sample, out) for pred in preds]
        return dict(predictions=preds, visualization=visualization)

    def _encode(self, prompts: tuple[str, ...]) -> dict[str, Tensor]:
        """Each prompt of a batch once; and not again for the teacher's turn, or for other seeds."""
        if self._encoded[0] != prompts:
            unique = list(dict.fromkeys(prompts))
            rows = torch.tensor([unique.index(prompt) for prompt in prompts])
            self._encoded = (
                prompts,
                {
                    name: value[rows.to(value.device)]
                    for name, value in self.text_encoder.encode(unique).items()
                },
            )
        return self._encoded[1]

    def _empty_prompt(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The condition that means "no prompt", for guidance."""
        if not self._empty:  # a solver asks at every step
            encoder = self.text_encoder
            self._empty = self._family.null(encoder) if self._family else encoder.encode([''])
        return {
            **cond,
            **{
                name: value.to(cond[name]).expand_as(cond[name])
                for name, value in self._empty.items()
            },
        }
