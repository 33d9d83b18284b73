# Copyright (c) mmfgm authors.
from mmfgm.tools.cache_prompts import main

if __name__ == '__main__':
    main()
