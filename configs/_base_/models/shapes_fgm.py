# a small MM-DiT on 32x32 pixels: 64 image tokens beside 8 words
model = dict(
    type='FGM',
    network=dict(
        type='SD3',
        latent_size='${image_size}',
        config=dict(
            sample_size='${image_size}',
            patch_size=4,
            in_channels=3,
            out_channels=3,
            num_layers=6,
            attention_head_dim=32,
            num_attention_heads=8,
            joint_attention_dim=64,
            caption_projection_dim=256,
            pooled_projection_dim=64,
            pos_embed_max_size=8,
        ),
    ),
    data_preprocessor=dict(type='ImagePreprocessor', flip_prob=0.0),
    # the generator starts as one denoising step of the teacher from t*, where c_in z stands for x_t
    generator=dict(type='OneStepGenerator', t_star=0.9, c_skip=0.9, c_in=0.9),
    loss=dict(type='FGMLoss', l1_weight=0.0),
    fm_time_sampler=dict(type='LogitNormal', mean=0.0, std=1.4),
    fgm_time_sampler=dict(type='LogitNormal', mean=0.8, std=1.4),
    guidance=dict(type='ClassifierFreeGuidance', scale=2.0, null=dict(type='ZeroPrompt')),
    gan=dict(
        feature_layer=2,
        time_sampler=dict(type='LogitNormal', mean=-1.0, std=1.0),
        head=dict(type='ConvDiscriminator', channels=64),
    ),
    ema=dict(generator_ema=0.999),
)
# what prompts mean to this network, for those who generate with it
text_encoder = dict(type='WordEncoder', max_words='${max_words}')
