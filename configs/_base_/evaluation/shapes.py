# GenEval's six task scores by an exact detector, noise, blur and spread against renderings of the
# same captions, and the distance to 10,000 other scenes; captions are few, so evaluation repeats
# those of training
prompts = dict(
    type='ShapePrompts',
    num_samples=1200,
    encoder=dict(max_words='${max_words}'),
    world='${world}',
)
evaluations = dict(
    shapes=dict(
        interval=2000,
        dataset=prompts,
        batch_size=200,
        metrics=dict(
            score=dict(type='ShapeScore', prompts=prompts),
            quality=dict(type='ShapeQuality', prompts=prompts),
            fd=dict(
                type='FrechetDistance',
                reference=dict(
                    type='Shapes', size='${image_size}', length=10000, seed=1, world='${world}'
                ),
                feature=dict(type='Pixels', pool=4),
            ),
        ),
    )
)
