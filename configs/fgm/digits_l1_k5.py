# the exact loss with five online updates a cycle, clipped: RealUID's own FGM
_base_ = 'digits.py'

model = dict(loss=dict(l1_weight=1.0))
train_cfg = dict(online_updates=5)
optim_wrapper = dict(
    online=dict(clip_grad=dict(max_norm=1.0)),
    generator=dict(clip_grad=dict(max_norm=1.0)),
)
