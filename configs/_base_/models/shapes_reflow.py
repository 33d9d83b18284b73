# a small MM-DiT on 32x32 pixels: 64 image tokens beside 8 words
model = dict(
    type='FlowMatching',
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
    # left and right mean something here: no flips
    data_preprocessor=dict(type='ImagePreprocessor', flip_prob=0.0),
    time_sampler=dict(type='LogitNormal', mean=0.0, std=1.0),
    null_condition=dict(type='ZeroPrompt'),
    null_prob=0.1,
    ema=dict(network_ema=0.999),
)
# what prompts mean to this network, for those who generate with it
text_encoder = dict(type='WordEncoder', max_words='${max_words}')
