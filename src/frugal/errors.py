"""The one exception that means "the user can mend this", and the check that raises it."""


class UserError(ValueError):
    """Bad input (config, data, checkpoint) whose message is one line that names the key or file and what to do.

    The command line prints the message alone, without a traceback, and exits with code 2.
    """


def require(condition: bool, message: str) -> None:
    """Raise a UserError with this message unless the condition holds."""
    if not condition:
        raise UserError(message)
