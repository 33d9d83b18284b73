# Consistency Flow Matching (Yang et al., 2024) on the digits themselves, from the teacher's weights
_base_ = 'digits.py'

model = dict(
    type='ConsistencyFM',
    teacher=dict(checkpoint='work_dirs/reflow/digits', prefix='network_ema'),
    # the authors' two segments; ten times their delta, for a run that is far shorter
    loss=dict(type='VelocityConsistencyLoss', segments=2, delta=0.01, boundary=0.1, alpha=1e-5),
    target='network_ema',
    time_sampler=dict(_delete_=True, type='Uniform'),
)
train_cfg = dict(max_iters=600)
optim_wrapper = dict(network=dict(optimizer=dict(lr=5e-4)))
evaluations = dict(fd=dict(interval=300, sampling=dict(nfe=2)))
default_hooks = dict(
    samples=dict(
        samplings=dict(
            _delete_=True, **{'Consistency-FM, 2 NFE': dict(network='network_ema', nfe=2)}
        )
    )
)
