# FGM needs no data; 8 processes x 32 samples are SiT's batch of 256
train_dataloader = dict(
    batch_size=32,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ConditionDataset', num_classes='${num_classes}'),
)
