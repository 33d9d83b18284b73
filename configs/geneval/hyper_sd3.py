# Hyper-SD3: a LoRA of 4 steps that keeps classifier-free guidance, on SD3's own scheduler
_base_ = 'sd3.py'

pipeline = dict(
    lora=dict(
        pretrained='ByteDance/Hyper-SD',
        weight_name='Hyper-SD3-4steps-CFG-lora.safetensors',
        scale=0.125,
    ),
    call=dict(num_inference_steps=4, guidance_scale=3.0),
)
