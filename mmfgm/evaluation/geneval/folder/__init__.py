# Copyright (c) mmfgm authors.
"""Images and verdicts on disk, in the layout of GenEval's reference."""
