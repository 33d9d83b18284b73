# FLUX.2 dev, 32 B parameters: flux2_klein_1024_lora with the one base sharded over the GPUs, 64 GB
# in bf16; nothing of it was tried on this model
_base_ = 'flux2_klein_1024_lora.py'

pretrained = 'black-forest-labs/FLUX.2-dev'
prompt_cache = 'data/flux2_dev/prompts'
latent_cache = 'data/flux2_dev/latents'

model = dict(
    # dev was distilled from guidance, which is its input; this is its pipeline's own value, so
    # model.guidance, which would guide it a second time, stays away
    network=dict(guidance=4.0),
    guidance=None,
)
# 1 x 24 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(batch_size=1)
train_cfg = dict(accumulation=24)
strategy = dict(
    type='FSDP2Strategy', block_types=('Flux2TransformerBlock', 'Flux2SingleTransformerBlock')
)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_flux2_dev')))
default_hooks = dict(samples=dict(samplings={'teacher, 50 NFE': dict(guidance=None)}))
