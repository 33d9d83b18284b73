# Z-Image (6 B parameters), one frozen bf16 base with adapters for all networks, as
# sd3_512_lora_1xb4.py, whose rank and learning rate these are; the batch is the paper's 192. What
# is not the paper's: guidance 5 is the pipeline's 4, which its model card names, and x_0 = z -
# v(z, 1) is the pipeline's own step, so that adapters alone can be exported
_base_ = 'sd3_1024.py'

pretrained = 'Tongyi-MAI/Z-Image'
prompt_cache = 'data/z_image/prompts'
latent_cache = 'data/z_image/latents'
model = dict(
    network=dict(type='ZImage', dtype='bfloat16'),
    generator=dict(t_star=1.0, c_out=1.0, c_in=1.0),
    guidance=dict(scale=5.0),
    lora=dict(
        rank=64,
        alpha=64,
        target_modules=(
            'attention.to_q',
            'attention.to_k',
            'attention.to_v',
            'attention.to_out.0',
            'feed_forward.w1',
            'feed_forward.w2',
            'feed_forward.w3',
        ),
    ),
)
strategy = dict(_delete_=True, precision='auto')
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=5e-5)),
    discriminator=dict(optimizer=dict(lr=5e-5)),
    generator=dict(optimizer=dict(lr=5e-5)),
)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_z_image')))
default_hooks = dict(
    samples=dict(samplings={'teacher, 28 NFE': dict(guidance=5.0)}),
)
