_base_ = 'sd3_1024.py'

latent_size = 64
latent_cache = 'data/sd3/latents_512'
