# Copyright (c) mmfgm authors.
from mmfgm.tools.merge_checkpoint import main

if __name__ == '__main__':
    main()
