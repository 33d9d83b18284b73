# Z-Image, 6 B parameters, all weights trained: three copies fit eight 80 GB GPUs. What is not said
# here to come from elsewhere is the recipe of Stable Diffusion 3 (Appendix B.2); guidance 5 is the
# pipeline's 4, which its model card names. Nothing of it was tried on this model.
_base_ = 'sd3_1024.py'

pretrained = 'Tongyi-MAI/Z-Image'
prompt_cache = 'data/z_image/prompts'
latent_cache = 'data/z_image/latents'

model = dict(network=dict(type='ZImage'), guidance=dict(scale=5.0))
strategy = dict(block_types=('ZImageTransformerBlock',))
# 2 x 12 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(batch_size=2)
train_cfg = dict(accumulation=12)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_z_image'), batch_size=2))
default_hooks = dict(
    samples=dict(samplings={'teacher, 28 NFE': dict(guidance=5.0)}),
    watch=dict(batch_size=2),
)
