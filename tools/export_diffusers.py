# Copyright (c) mmfgm authors.
from mmfgm.tools.export_diffusers import main

if __name__ == '__main__':
    main()
