# Copyright (c) mmfgm authors.
"""Random networks of GenEval's detectors and of CLIP, small enough for a test."""

import json
import os

import torch

SIZE = (96, 64)  # in place of (1333, 800)


def mmdet_config(tiny=True):
    """The config of GenEval's Mask2Former in mmdet, or the same classes with little of
    everything."""
    from mmfgm.evaluation.geneval.detectors.mmdet_detector import reference_config

    cfg = reference_config()
    if tiny:
        model, head = cfg.model, cfg.model.panoptic_head
        model.backbone.update(
            embed_dims=16, depths=[1, 1, 2, 1], num_heads=[1, 2, 2, 4], window_size=4
        )
        head.update(
            in_channels=[16, 32, 64, 128], feat_channels=32, out_channels=32, num_queries=20
        )
        head.positional_encoding.num_feats = head.pixel_decoder.positional_encoding.num_feats = 16
        head.pixel_decoder.norm_cfg.num_groups = 4
        head.pixel_decoder.encoder.num_layers = 2
        head.transformer_decoder.num_layers = 3
        for layer, attentions in (
            (head.pixel_decoder.encoder.layer_cfg, ['self_attn_cfg']),
            (head.transformer_decoder.layer_cfg, ['self_attn_cfg', 'cross_attn_cfg']),
        ):
            layer.ffn_cfg.update(embed_dims=32, feedforward_channels=64)
            for attention in attentions:
                layer[attention].update(embed_dims=32, num_heads=4)
        for step in cfg.test_dataloader.dataset.pipeline:
            if step.type == 'Resize':
                step.scale = SIZE
    return cfg


@torch.no_grad()
def make_plausible(
    classes, mask_embed, mask_feature, seed=0, confidence=4.0, scale=40.0, offset=4.0
):
    """Set the last layers so that a Mask2Former of random weights finds things: some queries are
    sure of a class, most of none, and masks are parts of the image with probabilities well above a
    half.

    Args:
        classes (nn.Linear): To class logits.
        mask_embed (nn.Linear), mask_feature (nn.Conv2d): The last layers before their product,
        which is the mask logits.
        seed (int): Of the class layer.
        confidence (float): Standard deviation of class logits, half of what "no object" has above
            others.
        scale (float): Of the mask logits.
        offset (float): Subtracted from the mask logits.
    """
    generator = torch.Generator().manual_seed(seed)
    torch.nn.init.normal_(
        classes.weight, std=confidence / classes.in_features**0.5, generator=generator
    )
    torch.nn.init.zeros_(classes.bias)
    classes.bias[-1] = 2 * confidence
    mask_embed.weight *= scale
    # one channel of the product is a constant
    for layer, value in ((mask_feature, 1.0), (mask_embed, -offset)):
        layer.weight[0], layer.bias[0] = 0, value


def make_mmdet_checkpoint(cfg, path, seed=0, **kwargs):
    """Save random weights for a config of mmdet, in its checkpoint format; returns the path as a
    string."""
    from mmengine.registry import DefaultScope

    from mmfgm.evaluation.geneval.detectors.mmdet_detector import build_network

    with torch.random.fork_rng(devices=[]), DefaultScope.overwrite_default_scope('mmdet'):
        torch.manual_seed(seed)
        network = build_network(cfg)
    head = network.panoptic_head
    make_plausible(
        head.cls_embed, head.mask_embed[-1], head.pixel_decoder.mask_feature, seed, **kwargs
    )
    torch.save(dict(meta=dict(epoch=1), state_dict=network.state_dict()), path)
    return os.fspath(path)


def smooth_images(*sizes, seed=0):
    """RGB images ``(H, W, 3)`` uint8 of coloured blobs."""
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.nn.functional.interpolate(
            torch.rand(1, 3, 6, 6, generator=generator), size, mode='bicubic'
        )
        for size in sizes
    ]
    return [
        (image[0] * 255).clip(0, 255).to(torch.uint8).permute(1, 2, 0).numpy().copy()
        for image in images
    ]


def make_transformers_folder(folder, seed=0, num_labels=80):
    """Save a random Mask2Former of the transformers library; returns the folder as a string."""
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig

    backbone = SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[1, 2, 2, 4],
        window_size=4,
        out_features=['stage1', 'stage2', 'stage3', 'stage4'],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        encoder_feedforward_dim=64,
        dim_feedforward=64,
        encoder_layers=1,
        decoder_layers=3,
        num_attention_heads=4,
        num_queries=20,
        num_labels=num_labels,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Mask2FormerForUniversalSegmentation(config)
    module = network.model.pixel_level_module.decoder.mask_projection
    embedder = network.model.transformer_module.decoder.mask_predictor.mask_embedder.get_submodule(
        '2.0'
    )
    make_plausible(network.class_predictor, embedder, module, seed)
    network.save_pretrained(folder)
    return os.fspath(folder)


def make_clip(folder, seed=0, quick_gelu=True):
    """Teach open_clip a tiny model and save random weights for it; returns its name and the file of
    the weights."""
    import open_clip

    name = 'mmfgm-tiny-quickgelu' if quick_gelu else 'mmfgm-tiny'
    config = dict(
        embed_dim=16,
        quick_gelu=quick_gelu,
        vision_cfg=dict(image_size=224, layers=2, width=32, head_width=16, patch_size=56),
        text_cfg=dict(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
    )
    (folder / f'{name}.json').write_text(json.dumps(config))
    open_clip.add_model_config(folder / f'{name}.json')
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = open_clip.create_model(name)
    torch.save(network.state_dict(), folder / f'{name}.pt')
    return name, os.fspath(folder / f'{name}.pt')
