"""The one exception a user is meant to read: printed as a single line, without a traceback, with exit status 2."""


class UserError(Exception):
    """A mistake in what the user gave us. The message names the thing, its value and the fix, on one line."""
