# 4 M pairs drawn by tools/draw_couplings.py; 8 processes x 16 pairs are the authors' batch of 128
train_dataloader = dict(
    batch_size=16,
    num_workers=2,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='Couplings', path='data/couplings/cifar10_uncond'),
)
