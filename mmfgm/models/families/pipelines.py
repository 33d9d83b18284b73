# Copyright (c) mmfgm authors.
"""Families whose models are pipelines in diffusers' folder format, and the one step of such a
pipeline."""

import inspect
import json
import os.path as osp
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.files import differences, read_json

from .base import FAMILIES, Family, LatentEncoder
from .hub import diffusers_module, hub_module, load_or_explain, quiet
from .latents import KLEncoder

if TYPE_CHECKING:
    from ..generators import OneStepGenerator

INDEX_FILE = 'model_index.json'


class PipelineStep(NamedTuple):
    """What a pipeline computes with ``num_inference_steps=1``: ``skip z - scale v(z,
    timestep)``."""

    timestep: float
    skip: float
    scale: float

    @classmethod
    def of(cls, scheduler: Any) -> 'PipelineStep':
        """Ask a scheduler of diffusers.

        Raises:
            UsageError: If it is not one for flow matching.
        """
        kind = type(scheduler).__name__
        # the first step of a solver of higher order, such as DPM-Solver++, is Euler's
        if (
            kind != 'FlowMatchEulerDiscreteScheduler'
            and scheduler.config.get('prediction_type') != 'flow_prediction'
        ):
            raise UsageError(
                f'the base pipeline has a {kind}, expected its FlowMatchEulerDiscreteScheduler, or'
                ' one with prediction_type=flow_prediction; name a base as it was published'
            )

        def step(z, v):
            # mu moves the inner times of a schedule only, and one step has none
            scheduler.set_timesteps(
                1, **(dict(mu=1.0) if scheduler.config.use_dynamic_shifting else {})
            )
            return float(
                scheduler.step(
                    torch.tensor([v]), scheduler.timesteps[0], torch.tensor([z])
                ).prev_sample
            )

        skip = step(1.0, 0.0)
        scale = -step(0.0, 1.0)
        return cls(float(scheduler.timesteps[0]), skip, scale)

    def check(self, generator: 'OneStepGenerator') -> None:
        """Raise a UsageError if no change of weights turns the step into the generator."""
        if generator.c_skip != self.skip:
            raise UsageError(
                f'the generator has c_skip={generator.c_skip}, but the one step of the stock'
                f' pipeline keeps {self.skip} of the noise, which no change of weights turns into'
                f' the other; train with model.generator.c_skip={self.skip}, or sample this one'
                ' with FGMInferencer'
            )

    def is_generator(self, generator: 'OneStepGenerator') -> bool:
        """Whether the step is the generator's own, with nothing to fold."""
        return (self.timestep, self.skip, self.scale, 1.0) == (
            1000 * generator.t_star,
            generator.c_skip,
            generator.c_out,
            generator.c_in,
        )


def read_index(pretrained: str) -> tuple[dict[str, Any], Family]:
    """The ``model_index.json`` of a folder or hub id, and the family that it is of.

    Raises:
        UsageError: If it is missing, gated, or of no family.
    """
    kind = ' or '.join(family.title for family in FAMILIES.values())
    try:
        from diffusers import DiffusionPipeline

        quiet()
    except ImportError as e:
        raise UsageError(
            f'this needs diffusers and transformers, which do not import ({e}): pip install '
            '"mmfgm[sd3]"'
        ) from e
    index = dict(
        load_or_explain(lambda: DiffusionPipeline.load_config(pretrained), pretrained, kind)
    )
    for family in FAMILIES.values():
        if family.recognises(index):
            return index, family
    known = ' or '.join(f'a {name}Pipeline' for f in FAMILIES.values() for name in f.pipelines)
    raise UsageError(f'{pretrained!r} is a {index.get("_class_name")}, expected {known}')


def find(pretrained: str) -> Family:
    """The family of a pipeline's folder or hub id.

    Raises:
        UsageError: If it is missing, gated, or of no family.
    """
    return read_index(pretrained)[1]


class DiffusersFamily(Family):
    """A family whose models are pipelines in diffusers' folder format.

    To export a generator as such a pipeline, a family sets ``folds`` and implements :meth:`fold`;
    for exports with LoRA :meth:`save_adapters` too.

    Attributes:
        pipeline_class (str), network_class (str): Names in diffusers; a family whose classes live
            elsewhere overrides :meth:`pipeline_type` and :meth:`network_type`.
        attribute (str): Of the network, under which it holds diffusers' module.
    """

    pipeline_class: str
    network_class: str
    attribute = 'transformer'
    # of ClassifierFreeGuidance, to be the pipeline's own
    guidance_options: dict[str, Any] = {}

    def pipeline_type(self) -> Any:
        return getattr(diffusers_module(), self.pipeline_class)

    def network_type(self) -> Any:
        return getattr(diffusers_module(), self.network_class)

    def without_weights(self, network: dict[str, Any]) -> dict[str, Any]:
        cls = self.network_type()
        pretrained = network['pretrained']
        place = dict(
            subfolder=network.get('subfolder', self.subfolder), revision=network.get('revision')
        )
        config = load_or_explain(
            lambda: cls.load_config(pretrained, **place), pretrained, self.title
        )
        dropped = ('pretrained', 'subfolder', 'revision', 'variant')
        return {
            **{key: value for key, value in network.items() if key not in dropped},
            'config': {key: value for key, value in config.items() if not key.startswith('_')},
        }

    def decoder(self, pretrained: str) -> dict[str, Any]:
        return dict(type='LatentDecoder', pretrained=pretrained)

    def latent_encoder(self, pretrained: str) -> LatentEncoder:
        return KLEncoder(pretrained, self.title)

    # the stock pipeline beside our ODE, for tools/check_teacher.py
    def stock_scale(self, pipeline: Any) -> float | None:
        """Guidance of two passes that the pipeline's call has unless told otherwise, in our scale;
        None where it makes one pass alone."""
        return inspect.signature(pipeline.__call__).parameters['guidance_scale'].default

    def stock_options(
        self, pipeline: Any, network: nn.Module, scale: float | None, count: int
    ) -> dict[str, Any]:
        """Arguments of the pipeline's call with which it is our ODE under that guidance, beside
        ``count`` prompts, noise and the number of steps."""
        return dict(guidance_scale=scale)

    def stock_times(self, steps: int, network: nn.Module, pretrained: str | None) -> Tensor:
        """:meth:`times` of this network's size and this pipeline, or the published one."""
        return self.times(steps)

    def to_stock(self, x_t: Tensor) -> Tensor:
        """The network's latents ``(N, *event)`` as the pipeline takes them."""
        return x_t

    def from_stock(self, latents: Tensor, like: Tensor) -> Tensor:
        """What the pipeline computes with, as the network's latents, whose shape ``like`` has."""
        return latents

    # export
    def open(self, pretrained: str) -> str:
        """The folder of a pipeline, downloaded if it is a hub id, with all parts that its index
        names.

        Raises:
            UsageError: If it is not of this family, cannot be had, or is not whole.
        """
        index, found = read_index(pretrained)
        if found is not self:
            raise UsageError(
                f'{pretrained!r} is a {index["_class_name"]}, expected a {self.title} pipeline,'
                ' as the network of the config is; name another base'
            )
        local = pretrained
        if not osp.isdir(pretrained):
            local = load_or_explain(
                lambda: self.pipeline_type().download(pretrained), pretrained, self.title
            )
            # into the same folder; the pipeline does not ask for them
            load_or_explain(
                lambda: hub_module().snapshot_download(
                    pretrained, allow_patterns=['README.md', 'LICENSE*']
                ),
                pretrained,
                self.title,
            )
        missing = [name for name in self.parts(local) if not osp.isdir(osp.join(local, name))]
        if missing:
            raise UsageError(
                f'{pretrained!r} is not whole: {", ".join(missing)} is missing; download all of it,'
                ' with hf download OWNER/NAME --local-dir FOLDER'
            )
        return local

    def parts(self, folder: str) -> list[str]:
        """Names of the parts of a pipeline's folder, each a folder of its own."""
        return [name for name, part in self._index(folder).items() if _is_part(part)]

    def step(self, folder: str) -> PipelineStep:
        """What a pipeline's folder computes with ``num_inference_steps=1``."""
        cls = getattr(diffusers_module(), self._index(folder)['scheduler'][1])
        scheduler = load_or_explain(
            lambda: cls.from_pretrained(folder, subfolder='scheduler'), folder, self.title
        )
        return PipelineStep.of(scheduler)

    def check_architecture(self, network: nn.Module, folder: str, base: str) -> None:
        """Raise a UsageError unless a pipeline's folder holds a network of the same architecture.

        Args:
            network (nn.Module): Of this family.
            folder (str): The pipeline.
            base (str): What the message calls it.
        """
        module = getattr(network, self.attribute)
        there = load_or_explain(
            lambda: type(module).load_config(folder, subfolder=self.subfolder), base, self.title
        )
        config = dict(module.config)
        same = [key for key in config if not key.startswith('_') and key != 'sample_size']
        differs = list(
            differences(
                {key: _plain(there.get(key)) for key in same},
                {key: _plain(config[key]) for key in same},
            )
        )
        if differs:
            raise UsageError(
                f'the network is of another architecture than the {self.subfolder} of {base!r}:'
                f' {"; ".join(differs[:4])}; name the base that it was distilled from'
            )

    def weights_dtype(self, network: nn.Module) -> torch.dtype:
        """Of a network's weights, adapters aside."""
        names = network.named_parameters()
        return next(p.dtype for name, p in names if 'lora_' not in name)

    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        """The module of diffusers whose one ``step`` in its pipeline is the generator, made of the
        generator's own tensors; rounded to ``dtype`` once.

        Args:
            generator (OneStepGenerator): Around a network of this family, without adapters.
            step (PipelineStep): Of the pipeline that will call the module.
            dtype (torch.dtype): Of the result.
            trained_in (torch.dtype): Of the network's weights in training.

        Raises:
            UsageError: If ``c_skip`` is not the pipeline's.
        """
        raise NotImplementedError(f'{type(self).__name__} does not fold')

    def save(self, module: nn.Module, network: nn.Module, folder: str, max_shard_size: str) -> None:
        """Save a folded module into a pipeline's folder.

        Raises:
            UsageError: If ``max_shard_size`` cannot be understood.
        """
        # the size of images that the pipeline makes unless told otherwise
        if 'sample_size' in module.config:
            module.register_to_config(sample_size=network.event_shape[-1])
        target = osp.join(folder, self.subfolder)
        try:
            module.save_pretrained(target, max_shard_size=max_shard_size)
        except ValueError as e:
            raise UsageError(
                f'max_shard_size={max_shard_size!r} is not understood ({e}); write 5GB or 500MB'
            ) from e
        file = osp.join(target, 'config.json')
        with open(file) as f:
            config = json.load(f)
        config.pop('_name_or_path', None)  # a folder that others do not have
        with open(file, 'w', encoding='utf-8') as f:
            f.write(json.dumps(config, indent=2, sort_keys=True) + '\n')

    def save_adapters(self, tensors: dict[str, Tensor], folder: str, name: str) -> None:
        """Write the file that the pipeline's ``load_lora_weights`` reads.

        Args:
            tensors (dict[str, Tensor]): ``LAYER.lora_A.weight`` and ``LAYER.lora_B.weight`` by the
                layers' names in diffusers' module.
            folder (str): Where to.
            name (str): Of the file.
        """
        layers = {f'{self.subfolder}_lora_layers': tensors}
        self.pipeline_type().save_lora_weights(folder, weight_name=name, **layers)

    def exported(self, network: nn.Module) -> dict[str, Any]:
        """The network's config in the description of an export, without ``pretrained``."""
        return dict(type=self.network.__name__, latent_size=network.event_shape[-1])

    def call_options(self, network: nn.Module) -> dict[str, Any]:
        """Arguments with which the stock pipeline, called with a prompt, is the generator."""
        return dict(num_inference_steps=1, guidance_scale=1.0)

    def usage(
        self,
        opened: str,
        network: nn.Module,
        *lines: str,
        options: str = '',
        call: dict[str, Any] | None = None,
    ) -> str:
        """Python lines for a model card: open a pipeline with plain diffusers and make an image.

        Args:
            opened (str): Folder or hub id to open.
            network (nn.Module): Of the generator.
            *lines (str): To add after it is opened.
            options (str): To add to the arguments of ``from_pretrained``.
            call (dict, optional): Arguments of the pipeline's call. Defaults to
                :meth:`call_options`.
        """
        cls = self.pipeline_type()
        given = (call or self.call_options(network)).items()
        arguments = ', '.join(f'{key}={value!r}' for key, value in given)
        return '\n'.join(
            [
                f'from {cls.__module__.split(".")[0]} import {cls.__name__}',
                f"pipe = {cls.__name__}.from_pretrained({opened!r}{options}).to('cuda')",
                *lines,
                # by name, as the first argument of some pipelines is an image
                f"image = pipe(prompt='a red cat', {arguments}).images[0]",
                "image.save('image.png')",
            ]
        )

    def _index(self, folder: str) -> dict[str, Any]:
        return read_json(osp.join(folder, INDEX_FILE), 'download the pipeline again', dict)


def _is_part(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value[0])


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
