# Stable Diffusion 3 medium as its authors recommend it, and as the paper evaluates it
_base_ = '../_base_/evaluation/geneval.py'

pipeline = dict(
    type='DiffusersPipeline',
    pretrained='stabilityai/stable-diffusion-3-medium-diffusers',
    dtype='float16',
    call=dict(num_inference_steps=28, guidance_scale=7.0, height=1024, width=1024),
    batch_size=4,
)
