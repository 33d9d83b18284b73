# Copyright (c) mmfgm authors.
"""Z-Image (Tongyi-MAI, 2025): our contract over diffusers' stock transformer and pipeline."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.flow import flux_times
from mmfgm.registry import MODELS, TASK_UTILS

from .base import register_family
from .blocks import features
from .folding import fold_layers
from .networks import DiffusersNetwork
from .pipelines import DiffusersFamily, PipelineStep
from .tokens import TokenEncoder, drop_padding

if TYPE_CHECKING:
    from ..generators import OneStepGenerator

TITLE = 'Z-Image'
# the pipeline's own patches: of latents, and of the single frame that an image is
PATCH = 2
LAYER = f'{PATCH}-1'
BLOCKS = ('layers',)
PIXELS = 8  # per latent
LONGEST = 512


@MODELS.register_module()
class ZImage(DiffusersNetwork):
    """Velocity of diffusers' ``ZImageTransformer2DModel`` on latents; for the arguments and errors
    see :class:`~mmfgm.models.families.networks.DiffusersNetwork`. Its ``latent_size`` must be
    given.

    That network's time is 1 at the data, and it predicts ``x_0 - eps``: ``v(x_t, t) = -net(x_t, 1 -
    t)``, here and only here. Features are of the layers; the refiners before them do not count.
    """

    network_class = 'ZImageTransformer2DModel'
    blocks = BLOCKS

    def __init__(self, latent_size: int, *args: Any, **kwargs: Any):
        super().__init__(latent_size, *args, **kwargs)
        self.feature_dim = self.transformer.config.dim

    def _event_shape(self, latent_size: int) -> tuple[int, int, int]:
        largest = PATCH * min(self.transformer.config.axes_lens[1:])
        if latent_size % PATCH or not 0 < latent_size <= largest:
            raise UsageError(
                f'latent_size={latent_size} must be a multiple of the patch size {PATCH}, and at'
                f' most {largest}, which the position embeddings of this network reach'
            )
        return (self.transformer.config.in_channels, latent_size, latent_size)

    @property
    def input_layer(self) -> nn.Module:
        """What takes ``x_t``, packed into tokens."""
        layer: nn.Module = next(iter(self.transformer.all_x_embedder.values()))
        return layer

    def dummy_conditions(self, batch_size: int) -> dict[str, Tensor]:
        """Conditions of full-length prompts, for rehearsals."""
        width = self.transformer.config.cap_feat_dim
        return dict(prompt_embeds=torch.zeros(batch_size, LONGEST, width))

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        prompt_embeds: Tensor,
        prompt_mask: Tensor | None = None,
        feature_layer: int | Sequence[int] | None = None,
    ) -> Tensor | list[Tensor]:
        """Velocity ``(N, C, h, w)``, or the image tokens after a layer as a map ``(N, D, h / 2, w /
        2)``.

        Args:
            x_t (Tensor): Latents ``(N, C, h, w)``.
            t (Tensor): ``(N,)`` in [0, 1].
            prompt_embeds (Tensor): ``(N, L, cap_feat_dim)``.
            prompt_mask (Tensor, optional): ``(N, L)``, 1 where there is a token and 0 after the
                last one. Defaults to tokens everywhere.
            feature_layer (int | Sequence[int], optional): Return the features after this layer,
                counted from 1, or a list of those after several, instead of the velocity; later
                layers are not run.

        Raises:
            UsageError: If there is no such layer.
        """
        dtype = self.transformer.all_final_layer[LAYER].linear.weight.dtype
        inputs = dict(
            x=list(x_t.to(dtype).unsqueeze(2)),  # each (C, 1, h, w)
            t=_time(t),
            cap_feats=drop_padding(prompt_embeds.to(dtype), prompt_mask),
            return_dict=False,
        )
        if feature_layer is None:
            return -torch.stack(self.transformer(**inputs)[0]).squeeze(2).to(x_t.dtype)
        height, width = (side // PATCH for side in x_t.shape[-2:])

        def to_map(tokens: Tensor) -> Tensor:
            # the tokens of the image come before those of the text
            image = tokens[:, : height * width]
            return image.transpose(1, 2).unflatten(2, (height, width)).to(x_t.dtype)

        return features(self.transformer, BLOCKS, feature_layer, inputs, to_map)


def _time(t: Tensor) -> Tensor:
    """``1 - t``, rounded as the pipeline does: its last bit is seen, as sinusoids are of 1000 times
    this."""
    return (1000 - 1000 * t) / 1000


@TASK_UTILS.register_module()
class ZImageTextEncoder(TokenEncoder):
    """Z-Image's Qwen3, which sees a prompt inside its chat template; see
    :class:`~mmfgm.models.families.tokens.TokenEncoder`.

    Args:
        pretrained (str): Hub id or local folder of a pipeline in diffusers' format.
        max_length (int): Tokens of a prompt, those of the template included. Defaults to 512.
        dtype (str): Of weights and embeddings. Defaults to ``'float32'``.

    Raises:
        UsageError: If the pipeline is missing or not whole, or ``max_length`` is out of range.
    """

    def __init__(self, pretrained: str, max_length: int = LONGEST, dtype: str = 'float32'):
        super().__init__(pretrained, max_length, LONGEST, dtype)

    def embed(self, prompts: list[str]) -> list[Tensor]:
        embeds, _ = self.pipeline.encode_prompt(
            prompts,
            self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_length,
        )
        return embeds

    def count_tokens(self, prompts: list[str]) -> list[int]:
        tokenizer = self.pipeline.tokenizer
        texts = [
            tokenizer.apply_chat_template(
                [dict(role='user', content=prompt)],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=True,
            )
            for prompt in prompts
        ]
        return [len(ids) for ids in tokenizer(texts).input_ids]


@register_family
class ZImageFamily(DiffusersFamily):
    """Z-Image, and Z-Image-Turbo, which is distilled to 8 steps and needs no guidance.

    The pipeline's ``guidance_scale`` is added to 1: its 4 is our 5, and its 0 our 1. Its
    ``cfg_truncation`` is 1 minus the ``low`` of our
    :class:`~mmfgm.flow.guidance.ClassifierFreeGuidance`. Its ``cfg_normalization``, off by
    default, only shortens, where our ``rescale`` also lengthens.
    """

    name = 'z_image'
    title = TITLE
    network = ZImage
    prompt_encoder = ZImageTextEncoder
    pipelines = ('ZImage',)
    pipeline_class = 'ZImagePipeline'
    network_class = 'ZImageTransformer2DModel'
    # Turbo's is 3
    shift = 6.0
    block_types = ('ZImageTransformerBlock',)
    adapter_targets = (
        'attention.to_q',
        'attention.to_k',
        'attention.to_v',
        'attention.to_out.0',
        'feed_forward.w1',
        'feed_forward.w2',
        'feed_forward.w3',
    )
    folds = True

    def recognises(self, index: dict[str, Any]) -> bool:
        # the pipelines that begin alike take images or controls as well
        return index.get('_class_name') == self.pipeline_class

    def load(self, pretrained: str, latent_size: int = 128, **options: Any) -> ZImage:
        """The network; its latents are those of the pipeline's 1024 pixels unless
        ``latent_size`` is given."""
        return ZImage(latent_size, pretrained=pretrained, **options)

    def times(self, steps: int, device: str | torch.device = 'cpu') -> Tensor:
        # the pipeline hands its scheduler even times to shift
        return flux_times(steps, self.shift, device)

    def stock_scale(self, pipeline: Any) -> float | None:
        # of the difference alone there
        return 1 + (super().stock_scale(pipeline) or 0)

    def stock_options(
        self, pipeline: Any, network: nn.Module, scale: float | None, count: int
    ) -> dict[str, Any]:
        height, width = (side * PIXELS for side in network.event_shape[-2:])
        return dict(guidance_scale=(scale or 1) - 1, height=height, width=width)

    def call_options(self, network: nn.Module) -> dict[str, Any]:
        size = PIXELS * network.event_shape[-1]
        return dict(num_inference_steps=1, guidance_scale=0.0, height=size, width=size)

    def fold(
        self,
        generator: 'OneStepGenerator',
        step: PipelineStep,
        dtype: torch.dtype,
        trained_in: torch.dtype = torch.float32,
    ) -> nn.Module:
        transformer: Any = generator.network.transformer
        embedder = transformer.t_embedder

        def sinusoids(t: Tensor) -> Tensor:
            scaled = _time(t) * transformer.config.t_scale
            return embedder.timestep_embedding(scaled, embedder.frequency_embedding_size)

        fold_layers(
            generator,
            step,
            (torch.tensor([generator.t_star]), torch.tensor([step.timestep / 1000])),
            sinusoids,
            embedder.mlp[0],
            transformer.all_x_embedder[LAYER],
            transformer.all_final_layer[LAYER].linear,
            dtype,
            trained_in,
        )
        return transformer.to(dtype)
