# data_root=None: where Debian's package dataset-fashion-mnist puts it
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='FashionMNIST', data_root=None),
)
