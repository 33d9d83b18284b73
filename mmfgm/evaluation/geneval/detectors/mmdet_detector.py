# Copyright (c) mmfgm authors.
"""GenEval's own detector: mmdet's Mask2Former Swin-S, with the settings that reproduce the
reference."""

import copy
import os.path as osp
import re
from functools import partial

import numpy as np
import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from torch import Tensor, nn

from mmfgm.errors import UsageError
from mmfgm.evaluation.features import download
from mmfgm.evaluation.geneval.judging.prompts import OBJECT_NAMES
from mmfgm.files import sha256
from mmfgm.models import load_tensors, read_state_dict
from mmfgm.registry import TASK_UTILS

from .base import Frame, Mask2FormerDetector
from .mmdet_speed import fast_deformable_attention, forward_head

CONFIG = 'mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco'
CHECKPOINT = (
    f'https://download.openmmlab.com/mmdetection/v3.0/mask2former/{CONFIG}/'
    f'{CONFIG}_20220504_001756-c9d0c4f2.pth'
)
# how the SHA-256 of the weights begins, by their file names: of mmdet 3.x and of 2.x, which are the
# same training
PUBLISHED = ('c9d0c4f2', '743b7d99')
# of mmdet 2.x in the reference, and of 3.x, whose parameters only have other names
RENAMED = (
    (r'(pixel_decoder\.encoder\.layers\.\d+)\.attentions\.0\.', r'\1.self_attn.'),
    (r'(transformer_decoder\.layers\.\d+)\.attentions\.0\.', r'\1.cross_attn.'),
    (r'(transformer_decoder\.layers\.\d+)\.attentions\.1\.', r'\1.self_attn.'),
    (r'((?:pixel_decoder\.encoder|transformer_decoder)\.layers\.\d+)\.ffns\.0\.', r'\1.ffn.'),
)
INSTALL = 'bash tools/install_mmcv_ops.sh'


def check_ops() -> None:
    """Raise a UsageError that says what to install unless mmdet and mmcv's compiled ops are
    there."""
    try:
        import mmdet.models  # noqa: F401
    except ImportError as e:
        raise UsageError(
            f"GenEval's Mask2Former needs mmdet, which does not import ({e}): pip install"
            f' "mmfgm[geneval]", then {INSTALL}'
        ) from e
    try:
        import mmcv.ops  # noqa: F401
    except (ImportError, AssertionError) as e:
        raise UsageError(
            f"GenEval's Mask2Former needs mmcv's compiled ops, which do not import ({e}). Build"
            f' them, which takes minutes: {INSTALL}. Without them there is the detector'
            ' TransformersMask2Former, whose scores do not compare with published ones'
        ) from e


def check_deformable_attention(device: torch.device) -> None:
    """Hold mmcv's compiled deformable attention against its PyTorch spelling, on random input.

    Raises:
        UsageError: If they disagree, or if the ops were built without this device.
    """
    from mmcv.ops import multi_scale_deform_attn as ops

    generator = torch.Generator().manual_seed(0)
    shapes = torch.tensor([[6, 4], [3, 2]])
    value, places, weights = (
        torch.rand(size, generator=generator).to(device)
        for size in ((2, 30, 8, 32), (2, 30, 8, 2, 4, 2), (2, 30, 8, 2, 4))
    )
    try:
        fast = ops.MultiScaleDeformableAttnFunction.apply(
            value, shapes.to(device), torch.tensor([0, 24], device=device), places, weights, 64
        )
    except RuntimeError as e:
        raise UsageError(
            f"mmcv's ops do not run on {device} ({str(e).strip()[:300]}); they may have been built"
            f' where torch saw no GPU: run {INSTALL} here'
        ) from e
    plain = ops.multi_scale_deformable_attn_pytorch(value, shapes, places, weights)
    if not torch.allclose(fast, plain, rtol=1e-4, atol=1e-4):
        raise UsageError(
            f"mmcv's deformable attention on {device} is wrong by"
            f' {float((fast - plain).abs().max()):.2g}: it was built for other hardware or another'
            f' torch; remove its cached build and run {INSTALL}'
        )


def rename_v2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters of mmdet 2.x under their names of 3.x; those of 3.x stay as they are."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def reference_config() -> Config:
    """mmdet's config of the reference's network, out of its own package."""
    import mmdet

    return Config.fromfile(
        osp.join(osp.dirname(mmdet.__file__), '.mim', 'configs', 'mask2former', f'{CONFIG}.py')
    )


def build_network(cfg: Config) -> nn.Module:
    """The network of a config of mmdet, without weights.

    Raises:
        UsageError: If it is no Mask2Former of COCO's 80 classes.
    """
    from mmdet.registry import MODELS

    model = copy.deepcopy(cfg.model)
    things, stuff = (
        model.get('panoptic_head', {}).get(f'num_{kind}_classes') for kind in ('things', 'stuff')
    )
    if model.get('type') != 'Mask2Former' or (things, stuff) != (len(OBJECT_NAMES), 0):
        raise UsageError(
            f"GenEval's detector is a Mask2Former of 80 things and no stuff, but the config is"
            f' of a '
            f'{model.get("type")} of {things} things and {stuff} stuff; use {CONFIG}'
        )
    # all weights come from the checkpoint
    model.backbone.init_cfg = None
    model.train_cfg = None
    return MODELS.build(model)


def build_pipeline(cfg: Config):
    """From a BGR image to the network's input, as mmdet 2.x did it: resized as uint8, which
    rounds."""
    from mmcv.transforms import Compose

    first, *others = copy.deepcopy(cfg.test_dataloader.dataset.pipeline)
    if not first.type.endswith('LoadImageFromFile'):
        raise UsageError(
            "the config's test pipeline must begin with LoadImageFromFile, but begins with"
            f' {first.type}'
        )
    load = dict(type='LoadImageFromNDArray', to_float32=False)
    return Compose([load, *(step for step in others if not step.type.endswith('LoadAnnotations'))])


def _read_config(path: str) -> Config:
    try:
        # a config is a program of the user's: whatever it raises is about the config
        return Config.fromfile(path)
    except Exception as e:
        raise UsageError(
            f"the detector's config {path!r} cannot be read: {type(e).__name__}: {e}; name one of"
            " mmdet 3.x, or leave `config` out for that of GenEval's network"
        ) from e


@TASK_UTILS.register_module()
class MMDetMask2Former(Mask2FormerDetector):
    """The Mask2Former Swin-S of GenEval's reference, in mmdet 3.x: same detections, in batches and
    without needless masks.

    Args:
        checkpoint (str): File or URL of the weights: that of mmdet 3.x, :data:`CHECKPOINT`, or that
            of mmdet 2.x, which the reference used; its parameters are renamed. An URL is downloaded
            into torch's hub folder. Scores of any other file, known by its SHA-256, are not
            comparable.
        config (str or Config, optional): Config of mmdet 3.x. Defaults to that of the reference's
            network, from mmdet's own package; scores of another are not comparable.
        score_threshold (float): The lowest score that the judge asks for. Defaults to 0.3,
            GenEval's lowest.
        prefilter (bool): Leave out, before their masks are enlarged, pairs of query and class that
            cannot reach the threshold; what exceeds it does not change. Defaults to True.
        batch_size (int): Images of equal size that go through the network together. Defaults to 8.
        device (str or torch.device, optional): Where the network starts. Defaults to the CPU; see
            :meth:`to`.
        weights_only (bool): See :func:`~mmfgm.models.weights.read_state_dict`.

    Raises:
        UsageError: If mmdet or mmcv's ops are missing, the config cannot be read, or checkpoint and
            config do not belong together: with a parameter missing or left over, scores would be
                near zero without a word.
    """

    def __init__(
        self,
        checkpoint: str,
        config: str | Config | None = None,
        score_threshold: float = 0.3,
        prefilter: bool = True,
        batch_size: int = 8,
        device: str | torch.device | None = None,
        weights_only: bool = True,
    ):
        check_ops()
        cfg = (
            reference_config()
            if config is None
            else config
            if isinstance(config, Config)
            else _read_config(config)
        )
        with DefaultScope.overwrite_default_scope('mmdet'):
            network = build_network(cfg)
            self.pipeline = build_pipeline(cfg)
        published = self._load(network, checkpoint, weights_only)
        self.comparable = config is None and published
        network.panoptic_head._forward_head = partial(forward_head, network.panoptic_head)
        what = (
            f'weights {osp.basename(checkpoint)}'
            if config is None
            else osp.basename(cfg.filename or 'config')
        )
        self.label = (
            'Mask2Former Swin-S (mmdet)'
            if self.comparable
            else f'Mask2Former (mmdet, {what}), not comparable with published GenEval scores'
        )
        self._tested = False
        super().__init__(
            network,
            score_threshold,
            prefilter,
            batch_size,
            device,
            network.test_cfg.get('max_per_image', 100),
        )

    @staticmethod
    def _load(network: nn.Module, checkpoint: str, weights_only: bool) -> bool:
        """Fill the network; whether the weights are a published file."""
        fix = f"name the file of mmdet 3.x: checkpoint='{CHECKPOINT}'"
        if re.match('https?://', checkpoint):
            checkpoint = download(
                checkpoint, None, fix.replace('the file', 'a local copy of the file')
            )
        state = read_state_dict(checkpoint, weights_only)
        published = osp.isfile(checkpoint) and sha256(checkpoint).startswith(PUBLISHED)
        if not published:
            MMLogger.get_current_instance().warning(
                f'{checkpoint} is none of the published files, whose SHA-256 begin with'
                f' {" and ".join(PUBLISHED)}: scores do not compare with published ones'
            )
        renamed = rename_v2(state)
        if renamed.keys() != state.keys():
            MMLogger.get_current_instance().info(
                f'{checkpoint} is of mmdet 2.x; its parameters get their names of 3.x'
            )
        try:
            load_tensors(network, renamed, checkpoint)
        except UsageError as e:
            raise UsageError(
                f'{e}. GenEval scores would be near zero; {fix}, or the config of this one'
            ) from e
        return published

    def to(self, device: str | torch.device) -> 'MMDetMask2Former':
        """Move the network, and return self; the first time on a GPU, mmcv's op is tested there.

        Raises:
            UsageError: If mmcv's ops do not work on the device.
        """
        if torch.device(device).type == 'cuda' and not self._tested:
            check_deformable_attention(torch.device(device))
            self._tested = True
        return super().to(device)  # type: ignore[return-value]

    def forward(self, images: list[np.ndarray]) -> tuple[Tensor, Tensor, Frame]:
        # contiguous, as OpenCV wants it
        data = [
            self.pipeline(dict(img=np.ascontiguousarray(image[..., ::-1]), img_id=0))
            for image in images
        ]
        batch = self.network.data_preprocessor(
            {key: [item[key] for item in data] for key in data[0]}, False
        )
        samples = batch['data_samples']
        with fast_deformable_attention():
            class_logits, mask_logits = self.network.panoptic_head(
                self.network.extract_feat(batch['inputs']), samples
            )
        frame = Frame(samples[0].batch_input_shape, samples[0].img_shape, samples[0].ori_shape)
        # those of the layers before are for training
        return class_logits[-1], mask_logits[-1], frame
