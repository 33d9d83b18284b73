# Copyright (c) mmfgm authors.
from mmfgm.tools.test import main

if __name__ == '__main__':
    main()
