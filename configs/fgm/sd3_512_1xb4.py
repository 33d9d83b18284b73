# one GPU: the same batch of 192 by accumulation, networks whole, bf16 by autocast
_base_ = 'sd3_1024.py'

latent_size = 64
latent_cache = 'data/sd3/latents_512'
strategy = dict(_delete_=True, type='SingleDeviceStrategy', precision='auto')
train_cfg = dict(accumulation=48)
