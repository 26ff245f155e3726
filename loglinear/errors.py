"""The one exception for a user's mistake."""


class UserError(ValueError):
    """Bad input: its message is one sentence that names the thing and the remedy; the command exits with 2."""
