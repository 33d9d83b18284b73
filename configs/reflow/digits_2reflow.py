# 2-ReFlow (Liu et al., 2022): flow matching on pairs that the teacher's ODE connects, drawn by
# tools/draw_couplings.py (README.md)
_base_ = 'digits.py'

model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/digits', prefix='network_ema'),
    time_sampler=dict(_delete_=True, type='Uniform'),
)
train_dataloader = dict(dataset=dict(_delete_=True, type='Couplings', path='data/couplings/digits'))
train_cfg = dict(max_iters=600)
optim_wrapper = dict(network=dict(optimizer=dict(lr=5e-4)))
evaluations = dict(fd=dict(interval=300, sampling=dict(nfe=1)))
default_hooks = dict(
    samples=dict(
        samplings=dict(_delete_=True, **{'2-ReFlow, 1 NFE': dict(network='network_ema', nfe=1)})
    )
)
