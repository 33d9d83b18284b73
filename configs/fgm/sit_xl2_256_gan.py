# with the GAN of the paper's SD3 (B.2) beside FGM's loss, on ImageNet's latents
_base_ = 'sit_xl2_256.py'

# what tools/cache_latents.py wrote
latent_cache = 'data/imagenet256/latents'
model = dict(
    gan=dict(
        feature_layer=2,
        generator_weight=1e-2,
        discriminator_weight=5e-2,
        time_sampler=dict(type='LogitNormal', mean=-1.5, std=1.0),
    )
)
train_dataloader = dict(
    num_workers=2,
    dataset=dict(
        _delete_=True,
        type='WithReal',
        conditions=dict(type='ConditionDataset', num_classes='${num_classes}'),
        real=dict(
            type='CachedLatents',
            path='${latent_cache}',
            latent_shape=(4, '${latent_size}', '${latent_size}'),
            prompts=False,
            labels=True,
        ),
    ),
)
optim_wrapper = dict(
    discriminator=dict(optimizer=dict(type='MomentumFreeAdam', lr=5e-6, betas=(0.0, 0.999)))
)
