# the DDPM++ U-Net of EDM, 55.7 M parameters, as a velocity network

# 0: unconditional
num_classes = 0
model = dict(
    type='FGM',
    network=dict(
        type='UNetVelocity',
        unet=dict(
            type='EDMUNet',
            img_resolution=32,
            in_channels=3,
            out_channels=3,
            label_dim='${num_classes}',
            model_channels=128,
            channel_mult=(2, 2, 2),
            num_blocks=4,
            attn_resolutions=(16,),
            # the generator is one fixed map, and the online network never sees a sample twice:
            # nothing to regularise
            dropout=0.0,
        ),
    ),
    generator=dict(type='OneStepGenerator', t_star=1.0),
    # L_2 alone (Section 5.1), and a wide range of noise levels for both losses (B.1)
    loss=dict(type='FGMLoss', l1_weight=0.0),
    fm_time_sampler=dict(type='LogitNormal', mean=0.0, std=2.0),
    fgm_time_sampler=dict(type='LogitNormal', mean=0.0, std=2.0),
    # the paper's decay, and two longer memories beside it
    ema=dict(generator_ema=0.999, generator_ema_9996=0.9996, generator_ema_9999=0.9999),
)
