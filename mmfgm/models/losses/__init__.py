# Copyright (c) mmfgm authors.
from .fgm import FGMLoss, fgm_terms
from .flow_matching import flow_matching_loss

__all__ = ['FGMLoss', 'fgm_terms', 'flow_matching_loss']
