# Flash-SD3: a PEFT adapter of 4 steps without guidance and without T5, as on its model card. The
# card's FlashFlowMatchEulerDiscreteScheduler is not in diffusers; FlowMatchLCMScheduler takes the
# same steps: to the estimate of x_0, then back to the next noise level with new noise
_base_ = 'sd3.py'

pipeline = dict(
    peft='jasperai/flash-sd3',
    load_args=dict(text_encoder_3=None, tokenizer_3=None),
    scheduler=dict(type='FlowMatchLCMScheduler'),
    call=dict(num_inference_steps=4, guidance_scale=0.0),
)
