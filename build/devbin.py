"""Writes an executable for each CNI type into a directory, for work in this repository: `devbin.py DIRECTORY`.

Each is a small shell script that becomes this interpreter, isolated from the caller's environment and folder, with
this repository's root in front of the module path and the script's own path as program name. What is installed on a
real host are bundles; these scripts only stand in for them.
"""

import os
import shlex
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

# "$0" goes in last, so that a link or a copy under another name is that other plugin, as with the bundles.
SCRIPT = """\
#!/bin/sh
exec {python} -I -c 'import sys
sys.path.insert(0, sys.argv[1])
sys.argv[:] = sys.argv[2:]
from cni.__main__ import main
sys.exit(main())' {root} "$0" "$@"
"""


def write(directory: str) -> None:
    """Replaces each file by rename: one that is being executed stays whole."""
    from cni.registry import PLUGINS  # noqa: PLC0415 - found by the path that was just set

    os.makedirs(directory, exist_ok=True)
    text = SCRIPT.format(python=shlex.quote(sys.executable), root=shlex.quote(ROOT))
    for plugin in PLUGINS:
        path = os.path.join(directory, plugin)
        with open(f"{path}.new", "w", encoding="utf-8", errors="surrogateescape") as file:
            file.write(text)
        os.chmod(f"{path}.new", 0o755)
        os.replace(f"{path}.new", path)


if __name__ == "__main__":
    write(sys.argv[1])
