# SiT-XL/2 (Ma et al., 2024), 675 M parameters, on the latents of Stable Diffusion's first VAE

num_classes = 1000
# height and width of latents: an eighth of an image's
latent_size = 32

model = dict(
    type='FGM',
    network=dict(type='SiT', latent_size='${latent_size}', num_classes='${num_classes}'),
    # the published file as it is
    teacher=dict(checkpoint='data/sit/SiT-XL-2-256x256.pt', prefix=''),
    # SiT is trained on uniform t, so that it knows t = 1 as well as any other
    generator=dict(type='OneStepGenerator', t_star=1.0),
    # L_2 alone (Section 5.1), and a wide range of noise levels for both losses (B.1), as for the
    # other teachers with classes
    loss=dict(type='FGMLoss', l1_weight=0.0),
    # losses are means over elements: the gradients stay large beside Adam's eps, and a GAN's weight
    # means what it does for SD3
    loss_scale=100.0,
    fm_time_sampler=dict(type='LogitNormal', mean=0.0, std=2.0),
    fgm_time_sampler=dict(type='LogitNormal', mean=0.0, std=2.0),
    # what the authors' FID with guidance is measured with: a scale of 1.5, on 3 of 4 channels
    guidance=dict(
        type='ClassifierFreeGuidance',
        scale=1.5,
        channels=3,
        null=dict(type='NullLabel', label='${num_classes}'),
    ),
    # hub id or local folder in diffusers' format; latents are scaled by its 0.18215 and not shifted
    decoder=dict(type='LatentDecoder', pretrained='stabilityai/sd-vae-ft-ema', subfolder=''),
    ema=dict(generator_ema=0.999, generator_ema_9999=0.9999),
)
