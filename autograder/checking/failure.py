"""The one error that a check raises, printed as a message and not as a wall of frames."""

import textwrap

WIDTH = 88  # columns of a cell's output in a notebook beside an open file browser


class CheckFailedError(AssertionError):
    """An answer is not right; the message says what was expected, what came, and the likely cause."""

    def lines(self) -> list[str]:
        """Return what a student is told, as it stands in feedback and reports."""
        return ["Not yet.", *str(self).splitlines()]

    def _render_traceback_(self) -> list[str]:
        """Tell IPython to print the message alone: the frames would be the check's, and the mistake is not there.

        Long lines are broken between words, for JupyterLab would break them anywhere.
        """
        wrap = textwrap.TextWrapper(WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        return [part for line in self.lines() for part in wrap.wrap(line) or [line]]
