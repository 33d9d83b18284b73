# one GPU: the same batch of 192 by accumulation, networks whole, bf16 by autocast
_base_ = 'sd3_1024.py'

model = dict(network=dict(latent_size=64))
train_dataloader = dict(
    dataset=dict(real=dict(path='data/sd3/latents_512', latent_shape=(16, 64, 64)))
)
strategy = dict(_delete_=True, type='SingleDeviceStrategy', precision='bf16')
train_cfg = dict(accumulation=48)
