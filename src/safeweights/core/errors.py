"""The one exception a user may cause."""


class UserError(Exception):
    """Wrong use or bad input: one line that says what is wrong and how to mend it.

    The command line prints the line without a traceback and exits with 2.
    """
