# Copyright (c) mmfgm authors.
from mmfgm.tools.browse_dataset import main

if __name__ == '__main__':
    main()
