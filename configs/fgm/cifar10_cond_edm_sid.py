# SiD (Zhou et al., 2024) with its alpha = 1.2 and its densities: l1_weight = 2 - 2 alpha
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
    loss=dict(l1_weight=-0.4, weight='sid'),
    # EDM's noise levels for the online network, the lower 80 % of its grid for the generator
    fm_time_sampler=dict(mean=-1.2, std=1.2),
    fgm_time_sampler=dict(_delete_=True, type='EDMGrid'),
)
# fresh noise for each network, as SiD draws it
train_cfg = dict(share_samples=False)
default_hooks = dict(
    samples=dict(
        nrow=10,
        dataset=dict(num_samples=100),
        samplings={'teacher, 50 NFE': dict(network='teacher', nfe=50, solver='heun')},
    )
)
