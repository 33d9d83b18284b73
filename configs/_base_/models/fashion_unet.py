# EDM's U-Net at 1.3 M parameters; preconditioned, it starts as the best linear denoiser and learns
# the rest
num_classes = 10
model = dict(
    network=dict(
        type='EDMVelocity',
        unet=dict(
            type='EDMUNet',
            img_resolution=28,
            in_channels=1,
            out_channels=1,
            label_dim='${num_classes}',
            model_channels=32,
            channel_mult=(1, 2, 2),
            num_blocks=1,
            attn_resolutions=(7,),
            dropout=0.0,
        ),
        # root mean square of the pixels
        sigma_data=0.8,
    ),
    # all shoes point to the left: no flips
    data_preprocessor=dict(type='ImagePreprocessor', flip_prob=0.0),
)
