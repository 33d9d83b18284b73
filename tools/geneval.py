# Copyright (c) mmfgm authors.
from mmfgm.tools.geneval import main

if __name__ == '__main__':
    main()
