# Lumina-Image 2.0 of 2.6 B parameters at 1024 px. Constants and optimizer are the paper's of Stable
# Diffusion 3 (B.2), the path being the same. The densities of t too, whose generator's loss sees
# noise: the pipeline's shift of 6 says that what counts happens there, more than with 3. Guidance
# and its renormalisation are the pipeline's own.
_base_ = [
    '../_base_/models/sd3_fgm.py',
    '../_base_/datasets/sd3_cached.py',
    '../_base_/schedules/sd3_fgm.py',
    '../_base_/evaluation/geneval.py',
    '../_base_/default_runtime.py',
]

pretrained = 'Alpha-VLLM/Lumina-Image-2.0'
prompt_cache = 'data/lumina2/prompts'
latent_cache = 'data/lumina2/latents'

# the features of layer 2: a twelfth of the depth, as with Stable Diffusion 3 medium, of 26
model = dict(network=dict(type='Lumina2'), guidance=dict(rescale=(-1,)))
strategy = dict(type='FSDP2Strategy', block_types=('Lumina2TransformerBlock',), precision='auto')
evaluations = dict(
    geneval=dict(
        dataset=dict(path='data/geneval/prompts_lumina2'), sampling=dict(network='generator_ema')
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
            'teacher, 30 NFE': dict(network='teacher', nfe=30, spacing='pipeline', guidance=4.0),
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
