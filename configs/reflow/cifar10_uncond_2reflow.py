# 2-ReFlow (Liu et al., 2022): flow matching on pairs that the ODE of the teacher, 1-ReFlow,
# connects; README.md has the command that draws them
_base_ = [
    '../_base_/models/cifar10_reflow.py',
    '../_base_/datasets/cifar10_couplings.py',
    '../_base_/schedules/cifar10_couplings.py',
    '../_base_/evaluation/cifar10_fid.py',
    '../_base_/default_runtime.py',
]

strategy = dict(precision='tf32')
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_uncond', prefix='network_ema'),
    # the pairs are the teacher's own
    data_preprocessor=dict(flip_prob=0.0),
    ema=dict(_delete_=True, network_ema=0.9999),
)
evaluations = dict(fid=dict(interval=50000, sampling=dict(network='network_ema', nfe=1)))
default_hooks = dict(
    checkpoint=dict(interval=5000, max_keep_ckpts=3, save_best='fid/fid', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=10000,
        dataset=dict(type='GenerationDataset', num_samples=64, num_classes='${num_classes}'),
        nrow=8,
        samplings={'1 NFE': dict(network='network_ema', nfe=1)},
    ),
)
