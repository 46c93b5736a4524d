"""The mark on packets that our forward chain lets pass: one bit, the same for every process of the host.

The bit is `forward_mark_bit` in the table [cni] of /etc/netloom/netloom.toml. Always of that file, whatever
NETLOOM_CONFIG says: plugins have their runtime's environment, the workers have their unit's, and all must agree. It is
part of the name by which our tables know their version, so a changed bit has them written anew.

The file is read again when it has changed; where it does not set the bit it is not parsed (tomllib takes milliseconds
to import).
"""

from __future__ import annotations

import errno
import os

from kernel import paths
from kernel.errors import KernelError, from_oserror

KEY = "forward_mark_bit"
DEFAULT_BIT = 24

_Signature = tuple[int, int, int, int]
_known: tuple[_Signature | None, int] = (None, DEFAULT_BIT)


def forward_bit() -> int:
    """The bit's number, 0 to 31.

    Raises:
        KernelError: the file cannot be read, or says something else.
    """
    global _known  # noqa: PLW0603 - the file is read once for each of its versions
    try:
        found = os.stat(paths.CONFIG_FILE)
    except (FileNotFoundError, NotADirectoryError):
        return DEFAULT_BIT
    except OSError as error:
        raise from_oserror(f"look for {paths.CONFIG_FILE}", error) from error
    signature = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    if _known[0] != signature:
        _known = (signature, _read())
    return _known[1]


def forward_mark() -> int:
    """The mark itself: a number with that one bit.

    Raises:
        KernelError: as `forward_bit`.
    """
    return 1 << forward_bit()


def _read() -> int:
    try:
        with open(paths.CONFIG_FILE, "rb") as file:
            data = file.read()
    except OSError as error:
        raise from_oserror(f"read {paths.CONFIG_FILE}", error) from error
    if not any(KEY.encode() in line for line in data.splitlines() if not line.lstrip().startswith(b"#")):
        return DEFAULT_BIT
    import tomllib  # noqa: PLC0415 - see the module

    what = f"read {KEY} in {paths.CONFIG_FILE}"
    try:
        table = tomllib.loads(data.decode()).get("cni", {})
    except (ValueError, RecursionError) as error:
        raise KernelError(what, errno.EINVAL, str(error)) from error
    if not isinstance(table, dict):
        raise KernelError(what, errno.EINVAL, f"cni: want a table, found {table!r}")
    bit = table.get(KEY, DEFAULT_BIT)
    if isinstance(bit, bool) or not isinstance(bit, int) or not 0 <= bit <= 31:
        raise KernelError(what, errno.EINVAL, f"cni.{KEY}: want a whole number from 0 to 31, found {bit!r}")
    return bit
