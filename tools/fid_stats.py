# Copyright (c) mmfgm authors.
from mmfgm.tools.fid_stats import main

if __name__ == '__main__':
    main()
