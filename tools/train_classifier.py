# Copyright (c) mmfgm authors.
from mmfgm.tools.train_classifier import main

if __name__ == '__main__':
    main()
