"""What ipamd refuses, and why: one type for each gRPC status code that it answers with.

The texts go to an operator unchanged: what was wanted, what was found, what to do. `code` is the name of a
`grpc.StatusCode`; the mapping happens once, in `service`. Nothing here knows gRPC.
"""


class IpamdError(Exception):
    """A refusal or a fault, with a text for an operator."""

    code = "INTERNAL"


class InvalidArgumentError(IpamdError):
    """The request can never work, whatever the state is."""

    code = "INVALID_ARGUMENT"


class NotFoundError(IpamdError):
    """There is no such pool, allocation or reservation."""

    code = "NOT_FOUND"


class AlreadyExistsError(IpamdError):
    """The address or the name is taken; the text names the holder."""

    code = "ALREADY_EXISTS"


class ExhaustedError(IpamdError):
    """There is no free address, or the disk is full."""

    code = "RESOURCE_EXHAUSTED"


class PreconditionError(IpamdError):
    """The state forbids it; the text says whose state."""

    code = "FAILED_PRECONDITION"


class UnavailableError(IpamdError):
    """Not now; the same request may work later."""

    code = "UNAVAILABLE"


class OutOfRangeError(IpamdError):
    """The revision is not, or no longer, remembered. `newest` is the one to go on from after a list."""

    code = "OUT_OF_RANGE"

    def __init__(self, text: str, newest: int) -> None:
        super().__init__(text)
        self.newest = newest


class CoolingError(UnavailableError):
    """What is free was freed too short a time ago."""


class NeedsBlockError(ExhaustedError):
    """A node-block pool has nothing in the blocks that this node holds: `cidr` is wanted, or ("") any.

    `otherwise`: what to answer where no block can be had.
    """

    def __init__(self, pool: str, range_set: int, cidr: str = "", *, otherwise: IpamdError | None = None) -> None:
        super().__init__(f"pool {pool}: this node wants a block more" if not cidr else f"pool {pool}: {cidr} is wanted")
        self.pool = pool
        self.range_set = range_set
        self.cidr = cidr
        self.otherwise = otherwise


class StartError(Exception):
    """The daemon cannot start; the text says what to do. Ends the process with status 1."""
