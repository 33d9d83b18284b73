# Qwen-Image (20 B parameters), one frozen bf16 base with adapters for all networks, as
# sd3_512_lora_1xb4.py, whose rank and learning rate these are; the batch is the paper's 192. What
# is not the paper's: guidance is the pipeline's own, true_cfg_scale 4 with norms kept patch by
# patch, and x_0 = z - v(z, 1) adds no choice of ours to it
_base_ = 'sd3_1024.py'

pretrained = 'Qwen/Qwen-Image'
prompt_cache = 'data/qwen_image/prompts'
latent_cache = 'data/qwen_image/latents'
model = dict(
    network=dict(type='QwenImage', dtype='bfloat16'),
    generator=dict(t_star=1.0, c_out=1.0, c_in=1.0),
    guidance=dict(rescale=True, patch=2),
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
            'img_mlp.net.0.proj',
            'img_mlp.net.2',
            'txt_mlp.net.0.proj',
            'txt_mlp.net.2',
        ),
    ),
    decoder=dict(type='QwenImageDecoder'),
)
strategy = dict(_delete_=True, precision='auto')
# 1 x 24 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(batch_size=1)
train_cfg = dict(accumulation=24)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=5e-5)),
    discriminator=dict(optimizer=dict(lr=5e-5)),
    generator=dict(optimizer=dict(lr=5e-5)),
)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_qwen_image')))
default_hooks = dict(samples=dict(samplings={'teacher, 28 NFE': dict(guidance=4.0)}))
