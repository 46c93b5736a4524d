"""iptables-legacy, whose tables can only be asked by its own programs; whether they are in use at all is in /proc.

Few hosts have it, so nothing is imported for it before it is needed: every cold process would pay.
"""

from __future__ import annotations

import errno

from kernel.errors import KernelError, from_oserror

PROGRAMS = {4: "iptables-legacy", 6: "ip6tables-legacy"}  # by IP version
PROGRAM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
TIMEOUT_S = 10.0

_TABLES = {4: "/proc/thread-self/net/ip_tables_names", 6: "/proc/thread-self/net/ip6_tables_names"}


def in_use(version: int, table: str) -> bool:
    """Whether iptables-legacy has this table in the calling thread's namespace."""
    try:
        with open(_TABLES[version], "rb") as file:
            return table.encode() in file.read().split()
    except OSError:
        return False


def path_of(program: str) -> str:
    """Where a program is; "" where it is not installed."""
    import shutil  # noqa: PLC0415 - see the module

    return shutil.which(program, path=PROGRAM_PATH) or ""


def run(program: str, *arguments: str, stdin: str = "") -> str:
    """Run one of the programs; what it prints.

    Raises:
        KernelError: it is not installed, or it refused; with its own words.
    """
    import subprocess  # noqa: PLC0415 - see the module

    what = f"run {program} {' '.join(arguments)}"
    path = path_of(program)
    if not path:
        raise KernelError(what, errno.ENOENT, "its tables are in use here, but the program is not installed")
    try:
        done = subprocess.run(
            [path, "-w", "5", *arguments],
            env={"PATH": PROGRAM_PATH},
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT_S,
            check=False,
        )
    except OSError as error:
        raise from_oserror(what, error) from error
    except subprocess.TimeoutExpired as error:
        raise KernelError(what, errno.ETIMEDOUT) from error
    if done.returncode:
        raise KernelError(what, 0, done.stderr.strip() or f"exit status {done.returncode}")
    return done.stdout
