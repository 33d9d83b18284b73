# ablation C.2 at 512 px: L_1 + L_2; the paper begins with an early checkpoint of a run without L_1
# (load_from=...)
_base_ = 'sd3_1024.py'

latent_size = 64
latent_cache = 'data/sd3/latents_512'
model = dict(loss=dict(l1_weight=1.0))
