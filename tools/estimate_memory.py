# Copyright (c) mmfgm authors.
from mmfgm.tools.estimate_memory import main

if __name__ == '__main__':
    main()
