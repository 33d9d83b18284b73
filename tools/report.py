# Copyright (c) mmfgm authors.
from mmfgm.tools.report import main

if __name__ == '__main__':
    main()
