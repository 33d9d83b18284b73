# Diff-Instruct (Luo et al., 2023), which the paper's tables mark with a dagger; w = t keeps its
# gradient, (1 - t)^2 (u - v), finite at t = 0
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    # the network of cifar10_cond_edm.py, which says what its settings are
    network=dict(
        type='EDMVelocity', sigma_data=0.5, sigma_range=(0.002, 80.0), unet=dict(augment_dim=9)
    ),
    teacher=dict(checkpoint='work_dirs/edm/cifar10_cond.safetensors', prefix='', into='unet'),
    # the generator starts as the denoiser at sigma = 2.5, which is t = 2.5 / 3.5 (SiD's choice)
    generator=dict(t_star=5 / 7, c_skip=5 / 7, c_in=5 / 7),
    loss=dict(_delete_=True, type='DiffInstructLoss', weight=dict(t=1.0)),
)
default_hooks = dict(
    samples=dict(
        nrow=10,
        dataset=dict(num_samples=100),
        samplings={'teacher, 50 NFE': dict(network='teacher', nfe=50, solver='heun')},
    )
)
