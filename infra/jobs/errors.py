"""What a head may answer instead of what it was asked for."""

from lodeset.pipeline.errors import LodesetError


class Unreachable(LodesetError):
    """The head does not answer. Its jobs may be running all the same."""


class Refused(LodesetError):
    """The head wants a token, or another one."""


class Unknown(LodesetError):
    """The head has no such job."""


class Taken(LodesetError):
    """The head has a job of this name already."""
