# FLUX.2 klein base of 4 B parameters, distilled neither from guidance nor into few steps: one
# frozen base in bf16 with adapters. What is not said here to come from elsewhere is the recipe of
# Stable Diffusion 3 (Appendix B.2); nothing of it was tried on this model.
_base_ = [
    '../_base_/models/sd3_fgm.py',
    '../_base_/datasets/sd3_cached.py',
    '../_base_/schedules/sd3_fgm.py',
    '../_base_/evaluation/geneval.py',
    '../_base_/default_runtime.py',
]

pretrained = 'black-forest-labs/FLUX.2-klein-base-4B'
# a sixteenth of an image's
latent_size = 64
prompt_cache = 'data/flux2/prompts'
latent_cache = 'data/flux2/latents'

model = dict(
    network=dict(type='Flux2', dtype='bfloat16'),
    # one step from pure noise, as the pipeline's own is: then adapters alone are the export, where
    # other values would be folded into the weights
    generator=dict(t_star=1.0, c_out=1.0, c_in=1.0),
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
            'ff.linear_in',
            'ff.linear_out',
            'ff_context.linear_in',
            'ff_context.linear_out',
            'attn.to_qkv_mlp_proj',
        ),
    ),
    decoder=dict(type='Flux2Decoder'),
)
# 2 x 12 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(
    batch_size=2,
    dataset=dict(real=dict(latent_shape=(128, '${latent_size}', '${latent_size}'))),
)
train_cfg = dict(accumulation=12)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=5e-5)),
    discriminator=dict(optimizer=dict(lr=5e-5)),
    generator=dict(optimizer=dict(lr=5e-5)),
)
strategy = dict(precision='auto')
evaluations = dict(
    geneval=dict(
        dataset=dict(path='data/geneval/prompts_flux2'),
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
            'teacher, 50 NFE': dict(network='teacher', nfe=50, spacing='pipeline', guidance=4.0),
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
