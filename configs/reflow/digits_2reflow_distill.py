# 2-ReFlow (+distill): x_0 from the noise alone, on pairs that the ODE of 2-ReFlow connects, drawn
# by tools/draw_couplings.py (README.md)
_base_ = 'digits.py'

model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/digits_2reflow', prefix='network_ema'),
    # at t = 1 the squared error of the velocity is that of x_0 = eps - v(eps, 1)
    time_sampler=dict(_delete_=True, type='Uniform', low=1.0, high=1.0),
)
train_dataloader = dict(
    dataset=dict(_delete_=True, type='Couplings', path='data/couplings/digits_2reflow')
)
train_cfg = dict(max_iters=600)
optim_wrapper = dict(network=dict(optimizer=dict(lr=5e-4)))
evaluations = dict(fd=dict(interval=300, sampling=dict(nfe=1)))
default_hooks = dict(
    samples=dict(
        samplings=dict(_delete_=True, **{'distilled, 1 NFE': dict(network='network_ema', nfe=1)})
    )
)
