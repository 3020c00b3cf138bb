"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake that the user can mend: one line that names the fix and the valid choices.

    The command line prints the message without a traceback and exits with ``exit_code``.
    """

    exit_code = 2


class RunFailure(Exception):
    """A run cannot go on; ``failure_class`` is what the run is marked with (for example ``nan``)."""

    exit_code = 1

    def __init__(self, failure_class: str, message: str) -> None:
        super().__init__(message)
        self.failure_class = failure_class


def choices(kind: str, given: object, valid: object) -> UserError:
    """Return the error for an unknown name: what was given and what would have been valid."""
    listed = ", ".join(str(item) for item in valid)  # type: ignore[attr-defined]
    return UserError(f"unknown {kind} {given!r}; valid: {listed}")
