# FLUX.1 dev, 12 B parameters: one frozen base in bf16 with adapters, as three copies do not fit.
# What is not said here to come from elsewhere is the recipe of Stable Diffusion 3 (Appendix B.2),
# whose latents have the same channels and scale; nothing of it was tried on this model.
_base_ = [
    '../_base_/models/sd3_fgm.py',
    '../_base_/datasets/sd3_cached.py',
    '../_base_/schedules/sd3_fgm.py',
    '../_base_/evaluation/geneval.py',
    '../_base_/default_runtime.py',
]

pretrained = 'black-forest-labs/FLUX.1-dev'
prompt_cache = 'data/flux/prompts'
latent_cache = 'data/flux/latents'

model = dict(
    # dev was distilled from guidance, which is its input; this is its pipeline's own value, so
    # model.guidance, which would guide it a second time, stays away
    network=dict(type='Flux', guidance=3.5, dtype='bfloat16'),
    guidance=None,
    # one step from pure noise, as the pipeline's own is: then adapters alone are the export, where
    # other values would be folded into 24 GB of weights
    generator=dict(t_star=1.0, c_out=1.0, c_in=1.0),
    # of 57 layers, 19 double and 38 single ones: as early as SD3's second of 24
    gan=dict(feature_layer=5),
    # rank and learning rate as in sd3_512_lora_1xb4
    lora=dict(
        rank=64,
        alpha=64,
        target_modules=(
            'attn.to_q',
            'attn.to_k',
            'attn.to_v',
            'attn.to_out.0',
            'attn.add_q_proj',
            'attn.add_k_proj',
            'attn.add_v_proj',
            'attn.to_add_out',
            'ff.net.0.proj',
            'ff.net.2',
            'ff_context.net.0.proj',
            'ff_context.net.2',
            'proj_mlp',
            'proj_out',
        ),
    ),
)
# 1 x 24 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(batch_size=1)
train_cfg = dict(accumulation=24)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=5e-5)),
    discriminator=dict(optimizer=dict(lr=5e-5)),
    generator=dict(optimizer=dict(lr=5e-5)),
)
strategy = dict(precision='auto')
evaluations = dict(
    geneval=dict(
        dataset=dict(path='data/geneval/prompts_flux'),
        batch_size=1,
        sampling=dict(network='generator_ema'),
    )
)
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=3),
    samples=dict(
        type='SampleHook',
        interval=500,
        nrow=4,
        dataset=dict(type='CachedPromptSamples', path='${prompt_cache}', num_samples=8),
        samplings={
            'teacher, 28 NFE': dict(network='teacher', nfe=28, spacing='pipeline'),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
    # latents are of about unit variance
    watch=dict(
        type='WatchHook',
        interval=500,
        bound=5.0,
        batch_size=1,
        dataset=dict(type='CachedPromptSamples', path='${prompt_cache}', num_samples=64),
    ),
)
