# Copyright (c) mmfgm authors.
from mmfgm.tools.convert_edm import main

if __name__ == '__main__':
    main()
