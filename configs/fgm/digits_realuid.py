# RealUID (ICLR 2026): real digits in the online loss, five online updates a cycle, clipped
_base_ = 'digits.py'

alpha = 0.94
# beta / alpha = 1.02
beta = 0.9588
model = dict(
    loss=dict(_delete_=True, type='RealUIDLoss', alpha=alpha, beta=beta),
    online_loss=dict(type='RealUIDOnlineLoss', alpha=alpha, beta=beta),
)
train_dataloader = dict(
    dataset=dict(
        _delete_=True,
        type='WithReal',
        conditions=dict(type='ConditionDataset', num_classes='${num_classes}'),
        real=dict(type='Digits'),
    )
)
train_cfg = dict(online_updates=5)
optim_wrapper = dict(
    online=dict(clip_grad=dict(max_norm=1.0)),
    generator=dict(clip_grad=dict(max_norm=1.0)),
)
