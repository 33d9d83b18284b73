# a published EDM network as the teacher, converted by
# python tools/convert_edm.py edm-cifar10-32x32-cond-vp.pkl work_dirs/edm/cifar10_cond.safetensors
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    # that network takes augmentation labels, which are zero outside of EDM's own training, and
    # knows these noise levels
    network=dict(
        type='EDMVelocity',
        sigma_data=0.5,
        sigma_range=(0.002, 80.0),
        unet=dict(augment_dim=9),
    ),
    teacher=dict(checkpoint='work_dirs/edm/cifar10_cond.safetensors', prefix='', into='unet'),
    # the generator starts as the denoiser at sigma = 2.5, which is t = 2.5 / 3.5 (SiD's choice)
    generator=dict(t_star=5 / 7, c_skip=5 / 7, c_in=5 / 7),
)
default_hooks = dict(
    samples=dict(
        nrow=10,
        dataset=dict(num_samples=100),
        samplings={
            'teacher, 50 NFE': dict(network='teacher', nfe=50, solver='heun', spacing='edm')
        },
    )
)
