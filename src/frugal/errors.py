"""The one exception that means "the user can mend this"."""


class UserError(ValueError):
    """Bad input (config, data, checkpoint) whose message is one line that names the key or file and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """
