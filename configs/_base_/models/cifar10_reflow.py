# the DDPM++ U-Net of EDM, 55.7 M parameters, as a velocity network

# 0: unconditional
num_classes = 0
model = dict(
    type='FlowMatching',
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
            dropout=0.13,
        ),
    ),
    data_preprocessor=dict(type='ImagePreprocessor', flip_prob=0.5),
    time_sampler=dict(type='Uniform'),
    ema=dict(network_ema=0.999, network_ema_9999=0.9999),
)
