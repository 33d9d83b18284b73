# FLUX.2 klein base of 4 B parameters, distilled neither from guidance nor into few steps; all
# weights trained. What is not said here to come from elsewhere is the recipe of Stable Diffusion 3
# (Appendix B.2); nothing of it was tried on this model.
_base_ = 'sd3_1024.py'

pretrained = 'black-forest-labs/FLUX.2-klein-base-4B'
# a sixteenth of an image's
latent_size = 64
prompt_cache = 'data/flux2/prompts'
latent_cache = 'data/flux2/latents'

model = dict(network=dict(type='Flux2'), decoder=dict(type='Flux2Decoder'))
strategy = dict(block_types=('Flux2TransformerBlock', 'Flux2SingleTransformerBlock'))
# 2 x 12 accumulation x 8 processes are the paper's batch of 192
train_dataloader = dict(
    batch_size=2,
    dataset=dict(real=dict(latent_shape=(128, '${latent_size}', '${latent_size}'))),
)
train_cfg = dict(accumulation=12)
evaluations = dict(geneval=dict(dataset=dict(path='data/geneval/prompts_flux2'), batch_size=1))
default_hooks = dict(
    samples=dict(
        samplings={
            '_delete_': True,
            'teacher, 50 NFE': dict(network='teacher', nfe=50, spacing='pipeline', guidance=4.0),
            'generator, 1 NFE': dict(network='generator_ema'),
        },
    ),
    watch=dict(batch_size=1),
)
