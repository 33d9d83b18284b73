# Copyright (c) mmfgm authors.
from mmfgm.lazy import attach

__getattr__, __dir__, __all__ = attach(
    __name__,
    {
        'artifacts': ['is_export'],
        'browsing': ['browse'],
        'classifier': ['train_classifier'],
        'comparison': ['compare'],
        'config': ['building', 'config_path', 'read_config', 'weights_of'],
        'couplings': ['draw_couplings'],
        'demo': ['serve'],
        'export': ['export_generator'],
        'faults': ['torture'],
        'inferencer': ['FGMInferencer'],
        'pipeline': ['OneStepPipeline'],
        'quickstart': ['run_quickstart'],
        'sampling_model': ['SamplingModel'],
        'schema': ['allow_in_exports'],
        'teacher_check': ['TeacherCheck', 'check_teacher'],
        'testing': ['measure'],
        'training': ['train'],
        'values': ['as_seeds', 'check_images', 'convert', 'draw_grid'],
    },
)
