_base_ = [
    '../_base_/models/sit_reflow.py',
    '../_base_/datasets/imagenet256_cached.py',
    '../_base_/schedules/sit_reflow.py',
    '../_base_/evaluation/imagenet256_fid.py',
    '../_base_/default_runtime.py',
]

strategy = dict(precision='auto')
evaluations = dict(fid=dict(interval=50000, sampling=dict(network='network_ema', nfe=250)))
default_hooks = dict(
    checkpoint=dict(interval=5000, max_keep_ckpts=3, save_best='fid/fid', rule='less'),
    samples=dict(
        type='SampleHook',
        interval=5000,
        dataset=dict(type='GenerationDataset', num_samples=16, num_classes='${num_classes}'),
        nrow=4,
        # the authors' pictures have a guidance of 4
        samplings={'teacher, 50 NFE': dict(network='network_ema', nfe=50, guidance=4.0)},
    ),
)
