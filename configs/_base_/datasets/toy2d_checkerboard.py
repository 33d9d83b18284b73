train_dataloader = dict(
    batch_size=512,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='Toy2D', shape='checkerboard'),
)
