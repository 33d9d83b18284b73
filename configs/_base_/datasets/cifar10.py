# labels for a network of any classes; 8 processes x 64 images are the paper's batch of 512
train_dataloader = dict(
    batch_size=64,
    num_workers=0,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(type='CIFAR10', data_root='data/cifar10', labels='${num_classes}'),
)
