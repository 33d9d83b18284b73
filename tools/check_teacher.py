# Copyright (c) mmfgm authors.
from mmfgm.tools.check_teacher import main

if __name__ == '__main__':
    main()
