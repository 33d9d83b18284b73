# one GPU: one frozen bf16 base with adapters, as sd3_512_lora_1xb4; rank and learning rate are not
# the paper's
_base_ = 'lumina2_1024.py'

model = dict(
    network=dict(dtype='bfloat16'),
    lora=dict(
        rank=64,
        alpha=64,
        target_modules=(
            'attn.to_q',
            'attn.to_k',
            'attn.to_v',
            'attn.to_out.0',
            'feed_forward.linear_1',
            'feed_forward.linear_2',
            'feed_forward.linear_3',
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
