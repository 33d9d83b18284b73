# Copyright (c) mmfgm authors.
from mmfgm.tools.compare import main

if __name__ == '__main__':
    main()
