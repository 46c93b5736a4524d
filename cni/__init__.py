"""The executables that a container runtime calls, and the CNI protocol around them (spec 0.1.0 to 1.1.0)."""

# Repeated from pyproject.toml (a test compares them): importlib.metadata would cost a cold start more than a whole ADD.
VERSION = "0.1.0"
