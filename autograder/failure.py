"""The one error that a check raises, printed as a message and not as a wall of frames."""


class CheckFailedError(AssertionError):
    """An answer is not right; the message says what was expected, what came, and the likely cause."""

    def _render_traceback_(self) -> list[str]:
        """Tell IPython to print the message alone: the frames would be the check's, and the mistake is not there."""
        return ["Not yet.", *str(self).splitlines()]
