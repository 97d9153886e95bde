"""The one exception that means "your input is wrong", as opposed to "our code failed"."""


class UserError(Exception):
    """Something the user can put right. The command line prints it as one line and exits with 2.

    The message names the wrong thing and the way out, and has no newline.
    """
