_base_ = 'sd3_1024.py'

model = dict(network=dict(latent_size=64))
train_dataloader = dict(
    dataset=dict(real=dict(path='data/sd3/latents_512', latent_shape=(16, 64, 64)))
)
