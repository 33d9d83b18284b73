# four steps of one generator
_base_ = 'shapes.py'

model = dict(
    # each step starts as the teacher's estimate at its time, the first one as in shapes.py
    generator=dict(
        _delete_=True,
        type='FewStepGenerator',
        times=(0.9, 0.75, 0.5, 0.25),
        c_skip=(0.9, 1.0, 1.0, 1.0),
        c_in=(0.9, 1.0, 1.0, 1.0),
    )
)
evaluations = dict(shapes=dict(sampling=dict(nfe=4)))
default_hooks = dict(
    samples=dict(
        samplings={
            'generator, 2 NFE': dict(network='generator_ema', nfe=2),
            'generator, 4 NFE': dict(network='generator_ema', nfe=4),
        }
    )
)
