# one GPU: teacher, online network, generator and its average are one frozen bf16 base with
# adapters; several processes hold it once each, or share it with strategy.type=FSDP2Strategy. Rank
# and learning rate are not the paper's, which trains all weights.
_base_ = 'sd3_1024.py'

latent_size = 64
latent_cache = 'data/sd3/latents_512'
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
            'attn.add_q_proj',
            'attn.add_k_proj',
            'attn.add_v_proj',
            'attn.to_add_out',
            'ff.net.0.proj',
            'ff.net.2',
            'ff_context.net.0.proj',
            'ff_context.net.2',
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
