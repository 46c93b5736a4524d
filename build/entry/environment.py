"""What a program of the bundle does before anything else: its environment becomes its caller's again.

PyInstaller's bootloader sets LD_LIBRARY_PATH to the bundle's libraries (what was there is in LD_LIBRARY_PATH_ORIG) and
variables of its own. A plugin that we execute must see neither, nor may they be taken for a request's environment.
"""

import os

_LIBRARIES = "LD_LIBRARY_PATH"


def restore() -> None:
    """Undo what the bootloader did to this process's environment."""
    before = os.environ.pop(f"{_LIBRARIES}_ORIG", None)
    if before is None:
        os.environ.pop(_LIBRARIES, None)
    else:
        os.environ[_LIBRARIES] = before
    for name in [name for name in os.environ if name.startswith("_PYI_")]:
        del os.environ[name]
