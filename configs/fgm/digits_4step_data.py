# four steps from the same noise, each given the estimate of the one before
_base_ = 'digits.py'

model = dict(generator=dict(type='DataSpaceGenerator', steps=4))
evaluations = dict(fd=dict(sampling=dict(nfe=4)))
default_hooks = dict(
    samples=dict(
        samplings={
            'generator, 2 NFE': dict(network='generator_ema', nfe=2),
            'generator, 4 NFE': dict(network='generator_ema', nfe=4),
        }
    )
)
