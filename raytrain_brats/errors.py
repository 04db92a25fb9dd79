"""The two ways a command ends badly.

In: nothing.
Out: UserError (the user can mend it, exit code 2) and RunFailed (we could not, exit code 1).
"""


class UserError(Exception):
    """A mistake that the user can correct. The message names what is wrong, where, and what to do."""


class RunFailed(Exception):  # noqa: N818 - it reads better than RunFailedError
    """The work could not be finished although the request was sound; what was saved stays saved."""
