# Copyright (c) mmfgm authors.
from mmfgm.tools.torture import main

if __name__ == '__main__':
    main()
