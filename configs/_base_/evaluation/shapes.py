# GenEval's six task scores by an exact detector; 460 captions exist, so evaluation repeats those of
# training
prompts = dict(type='ShapePrompts', num_samples=1200)
evaluations = dict(
    shapes=dict(
        interval=2000,
        dataset=prompts,
        batch_size=200,
        metrics=dict(score=dict(type='ShapeScore', prompts=prompts)),
    )
)
