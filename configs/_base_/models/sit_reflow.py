# SiT-XL/2 (Ma et al., 2024), 675 M parameters, on the latents of Stable Diffusion's first VAE

num_classes = 1000
# height and width of latents: an eighth of an image's
latent_size = 32
# what tools/cache_latents.py wrote
latent_cache = 'data/imagenet256/latents'

model = dict(
    type='FlowMatching',
    network=dict(type='SiT', latent_size='${latent_size}', num_classes='${num_classes}'),
    # None starts at random; a published file, with prefix='', goes on from it
    teacher=dict(checkpoint=None, prefix=''),
    time_sampler=dict(type='Uniform'),
    # the authors drop one label in ten, so that the network can be guided
    null_condition=dict(type='NullLabel', label='${num_classes}'),
    null_prob=0.1,
    # hub id or local folder in diffusers' format; latents are scaled by its 0.18215 and not shifted
    decoder=dict(type='LatentDecoder', pretrained='stabilityai/sd-vae-ft-ema', subfolder=''),
    ema=dict(network_ema=0.9999),
)
