# Copyright (c) mmfgm authors.
from mmfgm.tools.draw_couplings import main

if __name__ == '__main__':
    main()
