# FLUX.1 dev, 12 B parameters, all weights trained: three copies fit eight 80 GB GPUs. What is not
# said here to come from elsewhere is the recipe of Stable Diffusion 3 (Appendix B.2), whose latents
# have the same channels and scale; nothing of it was tried on this model.
_base_ = 'sd3_1024.py'

pretrained = 'black-forest-labs/FLUX.1-dev'
prompt_cache = 'data/flux/prompts'
latent_cache = 'data/flux/latents'

model = dict(
    # dev was distilled from guidance, which is its input; this is its pipeline's own value, so
    # model.guidance, which would guide it a second time, stays away
    network=dict(type='Flux', guidance=3.5),
    guidance=None,
    # of 57 layers, 19 double and 38 single ones: as early as SD3's second of 24
    gan=dict(feature_layer=5),
)
strategy = dict(block_types=('FluxTransformerBlock', 'FluxSingleTransformerBlock'))
# 1 x 24 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(batch_size=1)
train_cfg = dict(accumulation=24)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_flux'), batch_size=1))
default_hooks = dict(
    samples=dict(samplings={'teacher, 28 NFE': dict(guidance=None)}),
    watch=dict(batch_size=1),
)
