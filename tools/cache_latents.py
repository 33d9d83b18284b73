# Copyright (c) mmfgm authors.
from mmfgm.tools.cache_latents import main

if __name__ == '__main__':
    main()
