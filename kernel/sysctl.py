"""Network sysctls of the calling thread's namespace, by their parts: ("ipv4", "conf", "eth0", "arp_notify").

Parts and not dotted names, because interface names may hold dots.
"""

from __future__ import annotations

import os

from kernel.errors import from_oserror

_PAGE = 4096
_LONGEST = 1 << 17  # ip_local_reserved_ports alone may say something for each port


def _path(parts: tuple[str, ...]) -> str:
    for part in parts:
        if "/" in part or part in ("", ".", ".."):
            raise ValueError(f"{part!r} cannot be part of a sysctl's name")
    return "/proc/sys/net/" + "/".join(parts)


def read(*parts: str) -> str:
    """The value, without the newline.

    Raises:
        NotFound: this kernel or this namespace does not have it.
    """
    try:
        fd = os.open(_path(parts), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(f"read sysctl net.{'.'.join(parts)}", error) from error
    try:
        data = os.read(fd, _PAGE)
        if len(data) == _PAGE:
            data = os.pread(fd, _LONGEST, 0)
        return data.decode(errors="replace").strip()
    except OSError as error:
        raise from_oserror(f"read sysctl net.{'.'.join(parts)}", error) from error
    finally:
        os.close(fd)


def write(value: str, *parts: str) -> None:
    """Set the value.

    Raises:
        NotFound: this kernel or this namespace does not have it.
        KernelError: the kernel refused the value, or /proc/sys is read-only.
    """
    what = f"set sysctl net.{'.'.join(parts)} to {value}"
    try:
        fd = os.open(_path(parts), os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise from_oserror(what, error) from error
    try:
        os.write(fd, value.encode())
    except OSError as error:
        raise from_oserror(what, error) from error
    finally:
        os.close(fd)


def ensure(value: str, *parts: str) -> bool:
    """Set the value where it differs; True where it had to be set. Spares the kernel's work on writes of the same:
    `forwarding` walks over every device."""
    if read(*parts) == value:
        return False
    write(value, *parts)
    return True
