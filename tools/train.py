# Copyright (c) mmfgm authors.
from mmfgm.tools.train import main

if __name__ == '__main__':
    main()
