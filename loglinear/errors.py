"""The one exception for a user's mistake."""

EXIT_REFUSED = 2  # of a command, and of a rank, that bad input ended


class UserError(ValueError):
    """Bad input: its message is one sentence that names the thing and the remedy; the command exits with 2."""
