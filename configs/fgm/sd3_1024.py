_base_ = [
    '../_base_/models/sd3_fgm.py',
    '../_base_/datasets/sd3_cached.py',
    '../_base_/schedules/sd3_fgm.py',
    '../_base_/evaluation/geneval.py',
    '../_base_/default_runtime.py',
]

strategy = dict(type='FSDP2Strategy', block_types=('JointTransformerBlock',), precision='auto')
evaluations = dict(geneval=dict(sampling=dict(network='generator_ema')))
default_hooks = dict(
    checkpoint=dict(interval=500, max_keep_ckpts=3),
    samples=dict(
        type='SampleHook',
        interval=500,
        nrow=4,
        dataset=dict(type='CachedPromptSamples', path='${prompt_cache}', num_samples=8),
        samplings={
            'teacher, 28 NFE': dict(network='teacher', nfe=28, spacing='pipeline', guidance=7.0),
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
