# Copyright (c) mmfgm authors.
from mmfgm.tools.demo import main

if __name__ == '__main__':
    main()
