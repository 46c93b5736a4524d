"""Makes out/bundle: every program of Netloom, with all that they need but glibc. `make binaries` calls it.

Does nothing, quickly, when out/bundle was made from what is here now. out/bundle/BUILD tells which build it is (a name
that no other sources, libraries or interpreter get), which glibc it needs, and the CNI types in it. A bundle runs on
systems as old as the one that it was made on, and no older: Debian 12 (glibc 2.36) is the oldest that is supported, so
releases are made there.
"""

import ctypes.util
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from typing import NoReturn

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OUT = os.path.join(ROOT, "out")
BUNDLE = os.path.join(OUT, "bundle")
PACKAGES = ("cli", "cluster", "cni", "ipamd", "kernel", "libnetwork", "netd", "protos", "telemetry", "warm")
# Elsewhere than in Debian's amd64 and arm64: named by NETLOOM_LIBNFTABLES.
LIBRARY_DIRECTORIES = ("/usr/lib/x86_64-linux-gnu", "/usr/lib/aarch64-linux-gnu", "/usr/lib64", "/usr/lib")


def stop(text: str) -> NoReturn:
    print(f"netloom: {text}", file=sys.stderr)
    raise SystemExit(2)


def sources() -> Iterator[str]:
    """All files that decide what the bundle is, relative to the root, in a fixed order."""
    yield from ("build/constraints.txt", "build/netloom.spec", "build/bundle.py", "pyproject.toml")
    for package in (*PACKAGES, "build/entry"):
        for directory, below, files in os.walk(os.path.join(ROOT, package)):
            below[:] = sorted(name for name in below if not name.startswith((".", "__")))
            for name in sorted(files):
                if name.endswith(".py"):
                    yield os.path.relpath(os.path.join(directory, name), ROOT)


def libnftables() -> str:
    """The library's file."""
    given = os.environ.get("NETLOOM_LIBNFTABLES", "")
    name = ctypes.util.find_library("nftables") or "libnftables.so.1"
    for path in (given, *(os.path.join(directory, name) for directory in LIBRARY_DIRECTORIES)):
        if path and os.path.exists(path):
            return path
    stop(f"no {name} was found; apt-get install -y --no-install-recommends libnftables1, or set NETLOOM_LIBNFTABLES")


def build_name(library: str) -> str:
    """Version and digest: `0.1.0-3f2a9c51d0e4`."""
    digest = hashlib.sha256()
    for path in sources():
        with open(os.path.join(ROOT, path), "rb") as file:
            content = file.read()
        digest.update(f"{path} {len(content)}\n".encode() + content)
    status = os.stat(library)
    digest.update(f"{sys.version} {sys.executable} {library} {status.st_size} {status.st_mtime_ns}".encode())
    return f"{version()}-{digest.hexdigest()[:12]}"


def version() -> str:
    """The project's."""
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        return str(tomllib.load(file)["project"]["version"])


def made() -> str:
    """The name of the build that is there; empty where there is none."""
    try:
        with open(os.path.join(BUNDLE, "BUILD"), encoding="utf-8") as file:
            return dict(line.strip().partition("=")[::2] for line in file).get("build", "")
    except OSError:
        return ""


def elf_files(directory: str) -> Iterator[str]:
    for where, _, files in os.walk(directory):
        for name in sorted(files):
            path = os.path.join(where, name)
            with open(path, "rb") as file:
                if not os.path.islink(path) and file.read(4) == b"\x7fELF":
                    yield path


def glibc_floor(directory: str) -> tuple[int, ...]:
    """The newest glibc version that a symbol of any ELF file below asks for."""
    printed = subprocess.run(
        ["readelf", "--version-info", "--wide", *elf_files(directory)], capture_output=True, text=True, check=True
    ).stdout
    return max(tuple(map(int, version.split("."))) for version in re.findall(r"\bGLIBC_(\d+(?:\.\d+)+)", printed))


def types() -> list[str]:
    """The names that the launcher gets in /opt/cni/bin."""
    sys.path.insert(0, ROOT)
    from cni.registry import PLUGINS  # noqa: PLC0415 - found by the path that was just set

    return sorted(PLUGINS)


def strip_python(directory: str) -> None:
    """Debug information of a libpython that was built by hand is half of the bundle. Nothing else is touched: the
    libraries in wheels were patched, and strip(1) breaks some of those."""
    for path in elf_files(directory):
        if os.path.basename(path).startswith("libpython"):
            subprocess.run(["strip", "--strip-unneeded", path], check=True)


def make(name: str, library: str) -> None:
    work = os.path.join(OUT, "bundle.work")
    shutil.rmtree(work, ignore_errors=True)
    os.makedirs(work)
    log = os.path.join(OUT, "bundle.log")
    command = [sys.executable, "-I", "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN"]
    command += ["--workpath", os.path.join(work, "work"), "--distpath", os.path.join(work, "dist")]
    command.append(os.path.join(ROOT, "build/netloom.spec"))
    # PyInstaller keeps a cache in the user's home otherwise. The seed makes the same files of the same sources.
    environment = {
        **os.environ,
        "NETLOOM_LIBNFTABLES": library,
        "PYINSTALLER_CONFIG_DIR": os.path.join(work, "config"),
        "PYTHONHASHSEED": "1",
    }
    with open(log, "w", encoding="utf-8") as output:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=output, stderr=output, check=False)
    if done.returncode != 0:
        with open(log, encoding="utf-8", errors="replace") as output:
            print("".join(output.readlines()[-25:]), file=sys.stderr)
        stop(f"PyInstaller failed; all it said is in {os.path.relpath(log, ROOT)}")
    fresh = os.path.join(work, "dist/bundle")
    strip_python(fresh)
    floor = ".".join(map(str, glibc_floor(fresh)))
    with open(os.path.join(fresh, "BUILD"), "w", encoding="utf-8") as file:
        file.write(f"build={name}\nversion={version()}\nglibc={floor}\ntypes={' '.join(types())}\n")
    shutil.rmtree(BUNDLE, ignore_errors=True)
    os.rename(fresh, BUNDLE)
    shutil.rmtree(work)
    print(f"binaries: out/bundle is build {name}; it needs glibc {floor} or newer", file=sys.stderr)


def main() -> None:
    library = libnftables()
    name = build_name(library)
    os.makedirs(OUT, exist_ok=True)
    lock = os.open(OUT, os.O_RDONLY)  # two at once make one bundle
    fcntl.flock(lock, fcntl.LOCK_EX)
    if made() == name:
        return
    for tool, package in (("objcopy", "binutils"), ("readelf", "binutils"), ("ldd", "libc-bin")):
        if shutil.which(tool) is None:
            stop(f"{tool} is missing, which PyInstaller needs; apt-get install -y --no-install-recommends {package}")
    print("binaries: making out/bundle, which takes about a minute", file=sys.stderr)
    make(name, library)


if __name__ == "__main__":
    main()
