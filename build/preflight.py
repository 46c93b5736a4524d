"""Can this machine do what the demo and the kernel tests do? Stdlib only; run before anything was installed.

`preflight rights`: root, and the capabilities to administer networks and to make namespaces.

`preflight kernel`: veth, bridge, nftables with masquerade, each one really made, in private namespaces that end with
this process. Needs ip and libnftables. Prints `no-ipv6` when IPv6 is missing, which is no error.

Exit 2, with one line on stderr that says what is missing and what to do.
"""

import ctypes
import os
import subprocess
import sys
from typing import NoReturn

# include/uapi/linux/capability.h
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_NET_RAW": 13, "CAP_SYS_ADMIN": 21}
# include/uapi/linux/sched.h
CLONE_NEWNS, CLONE_NEWNET = 0x00020000, 0x40000000
IN_A_CONTAINER = "run it on the machine itself, or give this container all rights (docker run --privileged)"


def stop(text: str) -> NoReturn:
    print(f"netloom: {text}", file=sys.stderr)
    raise SystemExit(2)


def rights() -> None:
    if os.geteuid() != 0:
        stop("this makes network namespaces and needs root: run it again as root, for example with sudo")
    with open("/proc/self/status", encoding="ascii") as status:
        effective = next(int(line.split()[1], 16) for line in status if line.startswith("CapEff:"))
    lacking = [name for name, bit in CAPABILITIES.items() if not effective >> bit & 1]
    if lacking:
        stop(f"no right to administer networks ({', '.join(lacking)} missing): {IN_A_CONTAINER}")


def enter_private_namespaces() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET | CLONE_NEWNS) != 0:
        stop(f"cannot make a network namespace ({os.strerror(ctypes.get_errno())}): {IN_A_CONTAINER}")


def ip(*arguments: str) -> str:
    """What `ip` has to complain about; empty when it did as told."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    return "" if done.returncode == 0 else done.stderr.strip().splitlines()[-1]


class Nft:
    """The little of libnftables(3) that is needed: one command, and the complaint about it."""

    def __init__(self) -> None:
        self.lib = ctypes.CDLL("libnftables.so.1")
        self.lib.nft_ctx_new.restype = ctypes.c_void_p
        self.lib.nft_ctx_get_error_buffer.restype = ctypes.c_char_p
        self.context = ctypes.c_void_p(self.lib.nft_ctx_new(0))
        self.lib.nft_ctx_buffer_error(self.context)

    def __call__(self, command: str) -> str:
        if self.lib.nft_run_cmd_from_buffer(self.context, command.encode()) == 0:
            return ""
        text: bytes = self.lib.nft_ctx_get_error_buffer(self.context) or b"refused"
        return text.decode(errors="replace").strip().splitlines()[0]


def kernel() -> None:
    enter_private_namespaces()
    nft = Nft()
    chain = "add table inet netloom; add chain inet netloom out { type nat hook postrouting priority 100; }"
    trials = {
        "veth": ip("link", "add", "nl0", "type", "veth", "peer", "name", "nl1"),
        "bridge": ip("link", "add", "nl2", "type", "bridge"),
        "nftables masquerade": nft(chain) or nft("add rule inet netloom out ip saddr 192.0.2.1 masquerade"),
    }
    lacking = {what: complaint for what, complaint in trials.items() if complaint}
    if lacking:
        text = "; ".join(f"{what} ({complaint})" for what, complaint in lacking.items())
        remedy = "load the modules (modprobe -a veth bridge nft_masq) or boot Debian's standard kernel"
        stop(f"this kernel lacks {text}: {remedy}")
    ip("link", "set", "lo", "up")
    complaint = ip("-6", "address", "add", "fd00::1/128", "dev", "lo")
    if complaint:
        print(f"netloom: no IPv6 here ({complaint}): that part is left out", file=sys.stderr)
        print("no-ipv6")


if __name__ == "__main__":
    {"rights": rights, "kernel": kernel}[sys.argv[1]]()
