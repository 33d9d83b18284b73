# ablation C.1 at 512 px: x_0 = z - v(z, t*); the paper sweeps t_star over 0, 0.25, 0.5, 0.75 and 1
_base_ = 'sd3_1024.py'

latent_size = 64
latent_cache = 'data/sd3/latents_512'
model = dict(generator=dict(t_star=0.75, c_out=1.0, c_in=1.0))
