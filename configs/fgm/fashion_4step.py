# four steps of one generator
_base_ = 'fashion.py'

model = dict(
    # each step starts as the teacher's estimate at its time, the first one as in fashion.py
    generator=dict(
        _delete_=True,
        type='FewStepGenerator',
        times=(0.8, 0.6, 0.4, 0.2),
        c_skip=(0.8, 1.0, 1.0, 1.0),
        c_in=(0.8, 1.0, 1.0, 1.0),
    )
)
evaluations = dict(fd=dict(sampling=dict(nfe=4)))
default_hooks = dict(
    samples=dict(
        samplings={
            'generator, 2 NFE': dict(network='generator_ema', nfe=2),
            'generator, 4 NFE': dict(network='generator_ema', nfe=4),
        }
    )
)
