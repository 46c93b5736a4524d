"""Prints the nftables rule set of the namespace where this runs, as libnftables' JSON: `python -I nft_list.py`.

Through the library, because the demo needs no nft program.
"""

import ctypes
import sys

NFT_CTX_OUTPUT_JSON = 1 << 4  # nftables/libnftables.h


def ruleset() -> str:
    lib = ctypes.CDLL("libnftables.so.1")
    lib.nft_ctx_new.restype = ctypes.c_void_p
    lib.nft_ctx_get_output_buffer.restype = ctypes.c_char_p
    lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
    context = ctypes.c_void_p(lib.nft_ctx_new(0))
    lib.nft_ctx_output_set_flags(context, NFT_CTX_OUTPUT_JSON)
    lib.nft_ctx_buffer_output(context)
    lib.nft_ctx_buffer_error(context)
    if lib.nft_run_cmd_from_buffer(context, b"list ruleset") != 0:
        sys.exit(lib.nft_ctx_get_error_buffer(context).decode(errors="replace"))
    text: bytes = lib.nft_ctx_get_output_buffer(context)
    return text.decode()


if __name__ == "__main__":
    print(ruleset())
