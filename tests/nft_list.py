"""The nftables rule set of the namespace where this runs, as libnftables' JSON; `python -I nft_list.py` prints it.

Through the library, because the demo needs no nft program, and a program takes five times as long.
"""

import ctypes
import sys
import threading

NFT_CTX_OUTPUT_JSON = 1 << 4  # nftables/libnftables.h
_one_at_a_time = threading.Lock()  # the library keeps the names of links in a variable


def ruleset() -> str:
    """Of the network namespace of the calling thread. Raises OSError with the library's words."""
    with _one_at_a_time:
        lib = ctypes.CDLL("libnftables.so.1")
        lib.nft_ctx_new.restype = ctypes.c_void_p
        lib.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
        lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        context = ctypes.c_void_p(lib.nft_ctx_new(0))
        try:
            lib.nft_ctx_output_set_flags(context, NFT_CTX_OUTPUT_JSON)
            lib.nft_ctx_buffer_output(context)
            lib.nft_ctx_buffer_error(context)
            if lib.nft_run_cmd_from_buffer(context, b"list ruleset") != 0:
                raise OSError(lib.nft_ctx_get_error_buffer(context).decode(errors="replace"))
            text: bytes = lib.nft_ctx_get_output_buffer(context)
            return text.decode()
        finally:
            lib.nft_ctx_free(context)


if __name__ == "__main__":
    try:
        print(ruleset())
    except OSError as error:
        sys.exit(str(error))
