"""The version of Netloom, the same for every program.

Repeated from pyproject.toml (a test compares them): importlib.metadata would cost a cold start more than a whole ADD,
and there is no package metadata in a checkout or a bundle.
"""

VERSION = "0.1.0"
