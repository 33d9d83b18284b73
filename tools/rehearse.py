# Copyright (c) mmfgm authors.
from mmfgm.tools.rehearse import main

if __name__ == '__main__':
    main()
