"""The exceptions that are meant for those who started megarl."""


class UserError(Exception):
    """A mistake in what the user gave us. The message names the thing, its value and the fix, on one line.

    Printed as a single line, without a traceback, with exit status 2.
    """


class Stopped(Exception):
    """A signal ended the run where it could be ended, on every rank; what was to be saved is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


LONGEST_SHOWN = 160  # characters


def shown(value: object) -> str:
    """A value that a user gave, for one line."""
    text = repr(value)
    return text if len(text) <= LONGEST_SHOWN else f"{text[:LONGEST_SHOWN]}..."
