# Copyright (c) mmfgm authors.
from mmfgm.tools.generate import main

if __name__ == '__main__':
    main()
