# four steps of one generator
_base_ = 'sd3_1024.py'

model = dict(
    # 1, 0.9, 0.75 and 0.5; each step is x_t - t v(x_t, t), which diffusers' FlowMatchLCMScheduler
    # computes too, so that the export is a plain pipeline
    generator=dict(_delete_=True, type='FewStepGenerator', times=4, shift=3.0)
)
evaluations = dict(geneval=dict(sampling=dict(nfe=4)))
default_hooks = dict(
    samples=dict(
        samplings={
            'generator, 2 NFE': dict(network='generator_ema', nfe=2),
            'generator, 4 NFE': dict(network='generator_ema', nfe=4),
        }
    )
)
