# Stable Diffusion 3 medium, with the values of Appendix B.2, where it gives any.

# hub id or local folder in diffusers' format
pretrained = 'stabilityai/stable-diffusion-3-medium-diffusers'
# height and width of latents: an eighth of an image's
latent_size = 128
# what tools/cache_prompts.py and tools/cache_latents.py wrote
prompt_cache = 'data/sd3/prompts'
latent_cache = 'data/sd3/latents'

model = dict(
    type='FGM',
    network=dict(
        type='SD3', pretrained='${pretrained}', latent_size='${latent_size}', checkpointing=True
    ),
    # the network's own weights are the teacher's
    teacher=dict(checkpoint=None),
    # x_0 = z - 0.97 v(0.8 z, 0.97) (B.2)
    generator=dict(type='OneStepGenerator', t_star=0.97, c_skip=1.0, c_out=0.97, c_in=0.8),
    loss=dict(type='FGMLoss', l1_weight=0.0),
    # of the whole loss, GAN included; losses are means over elements, so that Adam's eps of 1e-6 is
    # small beside the gradients
    loss_scale=100.0,
    fm_time_sampler=dict(type='LogitNormal', mean=-1.0, std=2.0),
    fgm_time_sampler=dict(type='LogitNormal', mean=2.4, std=1.0),
    guidance=dict(
        type='ClassifierFreeGuidance',
        scale=4.0,
        null=dict(type='CachedNullPrompt', path='${prompt_cache}'),
    ),
    # the paper says low noise and gives no numbers: half of all t are below 0.18
    gan=dict(
        feature_layer=2,
        generator_weight=1e-2,
        discriminator_weight=5e-2,
        time_sampler=dict(type='LogitNormal', mean=-1.5, std=1.0),
    ),
    decoder=dict(type='LatentDecoder', pretrained='${pretrained}'),
    ema=dict(generator_ema=0.999),
)
