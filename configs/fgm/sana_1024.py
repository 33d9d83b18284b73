# SANA-1.5 of 1.6 B parameters at 1024 px. Constants, densities of t and optimizer are the paper's
# of Stable Diffusion 3 (B.2): SANA was trained on the same path, with times that favour its middle,
# and its pipeline has the same shift of 3. Guidance is the pipeline's own 4.5.
_base_ = [
    '../_base_/models/sd3_fgm.py',
    '../_base_/datasets/sd3_cached.py',
    '../_base_/schedules/sd3_fgm.py',
    '../_base_/evaluation/geneval.py',
    '../_base_/default_runtime.py',
]

pretrained = 'Efficient-Large-Model/SANA1.5_1.6B_1024px_diffusers'
# a 32nd of an image's
latent_size = 32
prompt_cache = 'data/sana/prompts'
latent_cache = 'data/sana/latents'

# the features of layer 2: a twelfth of the depth of Stable Diffusion 3 medium, and here 2 of 20
model = dict(network=dict(type='Sana'), guidance=dict(scale=4.5), decoder=dict(type='DCDecoder'))
strategy = dict(type='FSDP2Strategy', block_types=('SanaTransformerBlock',), precision='auto')
train_dataloader = dict(
    dataset=dict(real=dict(latent_shape=(32, '${latent_size}', '${latent_size}')))
)
evaluations = dict(
    geneval=dict(
        dataset=dict(path='data/geneval/prompts_sana'), sampling=dict(network='generator_ema')
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
            'teacher, 20 NFE': dict(network='teacher', nfe=20, spacing='pipeline', guidance=4.5),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
    # latents are of about unit variance
    watch=dict(
        type='WatchHook',
        interval=500,
        bound=5.0,
        batch_size=4,
        dataset=dict(type='CachedPromptSamples', path='${prompt_cache}', num_samples=64),
    ),
)
