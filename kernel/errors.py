"""What the kernel refuses, as exceptions that callers can tell apart.

Every failed operation raises KernelError or one of its four children; the text says what was attempted and what the
kernel answered, including its extended acknowledgement where it sent one.
"""

from __future__ import annotations

import errno
import os


class KernelError(Exception):
    """The kernel refused an operation. `errno` is the positive error number (0 where there is none)."""

    def __init__(self, operation: str, number: int, detail: str = "") -> None:
        self.operation = operation
        self.errno = number
        self.detail = detail
        reason = os.strerror(number) if number else "failed"
        super().__init__(f"{operation}: {reason}" + (f" ({detail})" if detail else ""))


class NotFound(KernelError):  # noqa: N818 - reads as what happened: `except NotFound`
    """The link, address, route, table or namespace is not there."""


class Exists(KernelError):  # noqa: N818
    """It is there already."""


class Busy(KernelError):  # noqa: N818
    """Somebody else uses it."""


class Denied(KernelError):  # noqa: N818
    """This process may not do that."""


_BY_NUMBER: dict[int, type[KernelError]] = {
    errno.ENOENT: NotFound,
    errno.ENODEV: NotFound,
    errno.ESRCH: NotFound,
    errno.ENXIO: NotFound,
    errno.EADDRNOTAVAIL: NotFound,
    errno.EEXIST: Exists,
    errno.EBUSY: Busy,
    errno.EPERM: Denied,
    errno.EACCES: Denied,
}


def from_errno(operation: str, number: int, detail: str = "") -> KernelError:
    """The exception for a positive error number."""
    return _BY_NUMBER.get(number, KernelError)(operation, number, detail)


def from_oserror(operation: str, error: OSError) -> KernelError:
    """The exception for a failed system call."""
    return from_errno(operation, error.errno or 0, "" if error.errno else str(error))
