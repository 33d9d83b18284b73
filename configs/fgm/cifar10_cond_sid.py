# SiD (Zhou et al., 2024) with its alpha = 1.2 and its densities: l1_weight = 2 - 2 alpha
_base_ = 'cifar10_uncond.py'

num_classes = 10
model = dict(
    teacher=dict(checkpoint='work_dirs/reflow/cifar10_cond'),
    loss=dict(l1_weight=-0.4, weight='sid'),
    # EDM's noise levels for the online network, the lower 80 % of its grid for the generator
    fm_time_sampler=dict(mean=-1.2, std=1.2),
    fgm_time_sampler=dict(_delete_=True, type='EDMGrid'),
    # the denoiser at sigma = 2.5, which is t = 2.5 / 3.5
    generator=dict(t_star=5 / 7, c_skip=5 / 7, c_in=5 / 7),
)
# fresh noise for each network, as SiD draws it
train_cfg = dict(share_samples=False)
default_hooks = dict(samples=dict(nrow=10, dataset=dict(num_samples=100)))
