# RealUID (ICLR 2026): real images in the online loss, alpha = 0.94 and beta / alpha = 1.02 of the
# ranges that its authors give, and their schedule
_base_ = 'cifar10_uncond.py'

alpha = 0.94
beta = 0.9588
num_classes = 10
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'),
    generator=dict(t_star=1.0, c_skip=1.0, c_in=1.0),
    loss=dict(_delete_=True, type='RealUIDLoss', alpha=alpha, beta=beta),
    online_loss=dict(type='RealUIDOnlineLoss', alpha=alpha, beta=beta),
    fm_time_sampler=dict(_delete_=True, type='Uniform'),
    fgm_time_sampler=dict(_delete_=True, type='Uniform'),
    data_preprocessor=dict(type='ImagePreprocessor'),
    ema=dict(_delete_=True, generator_ema=0.9999),
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='WithReal',
        conditions=dict(type='ConditionDataset', num_classes='${num_classes}'),
        real=dict(type='CIFAR10', data_root='data/cifar10', labels='${num_classes}'),
    )
)
train_cfg = dict(online_updates=5)
optim_wrapper = dict(
    online=dict(optimizer=dict(lr=3e-5), clip_grad=dict(max_norm=1.0)),
    generator=dict(optimizer=dict(lr=3e-5), clip_grad=dict(max_norm=1.0)),
)
param_scheduler = dict(
    online=[dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500)],
    generator=[dict(type='LinearLR', start_factor=1e-3, by_epoch=False, end=500)],
)
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
