# two steps of one generator: from noise, and from as much noise as data
_base_ = 'cifar10_uncond.py'

model = dict(generator=dict(_delete_=True, type='FewStepGenerator', times=(1.0, 0.5)))
evaluations = dict(fid=dict(sampling=dict(nfe=2)))
default_hooks = dict(
    samples=dict(samplings={'generator, 2 NFE': dict(network='generator_ema', nfe=2)})
)
