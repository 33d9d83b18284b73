# Copyright (c) mmfgm authors.


class UsageError(ValueError):
    """A mistake in a config, a path or the environment that the user can fix.

    The message names what was expected, what was found, and the fix. The command-line tools print
    it without a traceback and exit with code 2.
    """
