# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'colors': ['ClipColors'],
        'dataset': ['GenEvalPrompts', 'metadata_rows'],
        'detectors': [
            'Detected',
            'MMDetMask2Former',
            'Mask2FormerDetector',
            'TransformersMask2Former',
        ],
        'harness': ['find_metric', 'format_scores', 'generate_images', 'score_folder'],
        'judging': ['SCORES', 'Verdict', 'generate', 'judge', 'read_metadata', 'summarize'],
        'metric': ['GenEval'],
        'pipelines': ['DiffusersPipeline'],
        'scorer': ['Scorer'],
    },
)
