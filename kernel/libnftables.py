"""libnftables in this process, no exec: what nft would do with a text, as one transaction.

Source: libnftables(3).
"""

from __future__ import annotations

import ctypes
import errno
import os

from kernel.errors import KernelError, from_errno


def run(commands: str, what: str, *, check: bool = False) -> None:
    """Let libnftables run commands in the calling thread's namespace, as one transaction; `check`: only look whether
    they could be run.

    Raises:
        KernelError: it is not installed, or it refused; with its own words.
    """
    library = _library()
    context = library.nft_ctx_new(0)
    if not context:
        raise KernelError(what, errno.ENOMEM, "libnftables gave no context")
    try:
        library.nft_ctx_buffer_error(context)
        library.nft_ctx_set_dry_run(context, check)
        if library.nft_run_cmd_from_buffer(context, commands.encode()) != 0:
            words = library.nft_ctx_get_error_buffer(context) or b""
            first = words.decode(errors="replace").strip().splitlines()
            number = next(
                (n for n in (errno.EPERM, errno.ENOENT) if os.strerror(n) in words.decode(errors="replace")), 0
            )
            raise from_errno(what, number, first[0] if first else "libnftables refused")
    finally:
        library.nft_ctx_free(context)


_loaded: ctypes.CDLL | None = None


def _library() -> ctypes.CDLL:
    global _loaded  # noqa: PLW0603 - one library a process
    if _loaded is None:
        try:
            library = ctypes.CDLL("libnftables.so.1")
        except OSError as error:
            raise KernelError("load libnftables", errno.ENOENT, f"{error}; install the package libnftables1") from error
        library.nft_ctx_new.restype = ctypes.c_void_p
        library.nft_ctx_new.argtypes = [ctypes.c_uint32]
        library.nft_ctx_free.argtypes = [ctypes.c_void_p]
        library.nft_ctx_buffer_error.argtypes = [ctypes.c_void_p]
        library.nft_ctx_set_dry_run.argtypes = [ctypes.c_void_p, ctypes.c_bool]
        library.nft_ctx_get_error_buffer.argtypes = [ctypes.c_void_p]
        library.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
        _loaded = library
    return _loaded
