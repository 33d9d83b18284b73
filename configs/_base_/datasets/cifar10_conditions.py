# FGM needs no data; 8 processes x 64 samples are the paper's batch of 512
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='ConditionDataset', num_classes='${num_classes}'),
)
