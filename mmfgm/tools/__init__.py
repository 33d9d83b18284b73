# Copyright (c) mmfgm authors.
