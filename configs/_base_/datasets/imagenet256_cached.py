# latents and labels encoded beforehand by tools/cache_latents.py; 8 processes x 32 are SiT's batch
# of 256
train_dataloader = dict(
    batch_size=32,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type='CachedLatents',
        path='${latent_cache}',
        latent_shape=(4, '${latent_size}', '${latent_size}'),
        prompts=False,
        labels=True,
    ),
)
