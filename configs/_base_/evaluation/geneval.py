# GenEval: 553 prompts, 4 samples each. tools/geneval.py prompts writes the prompts,
# tools/cache_prompts.py encodes them. Detector and CLIP are downloaded at the first start, or name
# local files
evaluations = dict(
    geneval=dict(
        interval=2000,
        dataset=dict(type='GenEvalPrompts', path='data/geneval/prompts', samples_per_prompt=4),
        batch_size=4,
        metrics=dict(
            geneval=dict(
                type='GenEval',
                detector=dict(
                    type='MMDetMask2Former',
                    checkpoint='https://download.openmmlab.com/mmdetection/v3.0/mask2former/'
                    'mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco/'
                    'mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco_20220504_001756-c9d0c4f2.pth',
                ),
                colors=dict(type='ClipColors', model='ViT-L-14-quickgelu', pretrained='openai'),
            )
        ),
    )
)
