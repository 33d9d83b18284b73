# prompts and latents encoded beforehand by tools/cache_prompts.py and tools/cache_latents.py; 4 x 6
# accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(
    batch_size=4,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='WithReal',
        conditions=dict(type='CachedPrompts', path='${prompt_cache}'),
        real=dict(
            type='CachedLatents',
            path='${latent_cache}',
            latent_shape=(16, '${latent_size}', '${latent_size}'),
        ),
    ),
)
