# our generator, exported by tools/export_diffusers.py into a stock pipeline: one step, no guidance
_base_ = 'sd3.py'

pipeline = dict(
    pretrained='work_dirs/fgm/sd3_1024/diffusers',
    dtype='bfloat16',
    call=dict(num_inference_steps=1, guidance_scale=1.0),
)
