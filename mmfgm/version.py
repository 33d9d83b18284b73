# Copyright (c) mmfgm authors.
__version__ = '0.1.0'
