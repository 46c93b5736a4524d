"""What the virtual environment must hold, read from pyproject.toml. Any Python from 3.11 runs this, nothing installed.

`requirements list`: one requirement per line, for pip's -r.

`requirements stamp`: a digest of the requirements, the pinned versions, the interpreter and this folder's path. A
virtual environment made for another digest is outdated, or was moved, and is made anew.
"""

import hashlib
import os
import sys
import tomllib

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def requirements() -> list[str]:
    with open(os.path.join(ROOT, "pyproject.toml"), "rb") as file:
        document = tomllib.load(file)
    return [*document["project"]["dependencies"], *document["dependency-groups"]["dev"]]


def stamp() -> str:
    with open(os.path.join(ROOT, "build", "constraints.txt"), "rb") as file:
        pins = file.read()
    parts = [*requirements(), sys.version, os.path.realpath(sys.executable), ROOT]
    return hashlib.sha256(b"\0".join([pins, *map(os.fsencode, parts)])).hexdigest()


print(stamp() if sys.argv[1:] == ["stamp"] else "\n".join(requirements()))
