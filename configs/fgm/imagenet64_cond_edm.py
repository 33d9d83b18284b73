# EDM's published ADM network of ImageNet-64 as the teacher, converted from
# edm-imagenet-64x64-cond-adm.pkl by tools/convert_edm.py
_base_ = 'cifar10_uncond.py'

num_classes = 1000
model = dict(
    # that network knows these noise levels
    network=dict(
        _delete_=True,
        type='EDMVelocity',
        sigma_data=0.5,
        sigma_range=(0.002, 80.0),
        unet=dict(
            type='ADMUNet',
            img_resolution=64,
            in_channels=3,
            out_channels=3,
            label_dim='${num_classes}',
            dropout=0.0,
        ),
    ),
    teacher=dict(checkpoint='work_dirs/edm/imagenet64_cond.safetensors', prefix='', into='unet'),
    # the generator starts as the denoiser at sigma = 2.5, which is t = 2.5 / 3.5 (SiD's choice)
    generator=dict(t_star=5 / 7, c_skip=5 / 7, c_in=5 / 7),
)
# 296 M parameters, five times CIFAR-10's: a quarter of its learning rate, and its batch of 512 as 8
# processes x 16 x 4
train_dataloader = dict(batch_size=16)
train_cfg = dict(accumulation=4, share_samples=False)
optim_wrapper = dict(online=dict(optimizer=dict(lr=5e-6)), generator=dict(optimizer=dict(lr=5e-6)))
strategy = dict(precision='auto')
# EDM's own statistics of the 64-pixel training images
evaluations = dict(fid=dict(metrics=dict(fid=dict(reference='data/imagenet64/imagenet-64x64.npz'))))
default_hooks = dict(
    samples=dict(
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50, solver='heun', spacing='edm')
        },
    )
)
