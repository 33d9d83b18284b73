# one GPU: one frozen bf16 base with adapters, as sd3_512_lora_1xb4; rank and learning rate are not
# the paper's
_base_ = 'sana_1024.py'

model = dict(
    network=dict(dtype='bfloat16'),
    lora=dict(
        rank=64,
        alpha=64,
        target_modules=(
            'attn1.to_q',
            'attn1.to_k',
            'attn1.to_v',
            'attn1.to_out.0',
            'attn2.to_q',
            'attn2.to_k',
            'attn2.to_v',
            'attn2.to_out.0',
            'ff.conv_inverted',
            'ff.conv_point',
        ),
    ),
)
strategy = dict(_delete_=True, precision='auto')
train_cfg = dict(accumulation=48)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=5e-5)),
    discriminator=dict(optimizer=dict(lr=5e-5)),
    generator=dict(optimizer=dict(lr=5e-5)),
)
