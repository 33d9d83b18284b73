# Copyright (c) mmfgm authors.
"""The errors that a user can act on, and the codes that the commands exit with."""

# rehearse.py: the run does not fit the GPU that was named
EXIT_DOES_NOT_FIT = 1
# a mistake of the user, with a message
EXIT_USAGE = 2
# a loss, a gradient or a sample became inf or nan, or weights or data held one already
EXIT_NON_FINITE = 3
# EX_TEMPFAIL of sysexits.h: nothing is wrong, start it again (with --resume)
EXIT_PREEMPTED = 75


class UsageError(ValueError):
    """A mistake in a config, a path or the environment that the user can fix.

    The message names what was expected, what was found, and the fix. The command-line tools print
    it without a traceback and exit with code 2.
    """


class DamagedError(UsageError):
    """A file is not as it was written: a disk, a copy or a transfer has changed it.

    Args:
        filename (str): The file or folder.
        why (str): What is wrong with it.
    """

    def __init__(self, filename: str, why: str):
        self.filename = filename
        self.why = why
        super().__init__(
            f'{filename!r} cannot be read as what was written: {" ".join(why.split())[:500]}; copy'
            ' it again from where it is whole, or name another'
        )

    def __reduce__(self) -> tuple:
        # it travels between processes
        return type(self), (self.filename, self.why)


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a sample became inf or nan; the command-line tools exit with code 3."""


class NonFiniteInputError(NonFiniteError, UsageError):
    """Weights or data hold inf or nan already where they come in: the user can replace them."""

    """A loss or a gradient became inf or nan; the command-line tools exit with code 3."""


class Interrupted(SystemExit):
    """SIGTERM or Ctrl-C ended something between two of its steps; the exit code is 75."""

    def __init__(self, message: str):
        super().__init__(EXIT_PREEMPTED)
        self.message = message

    def __str__(self) -> str:
        return self.message
