"""What the shim refuses, in words for the operator who typed the docker command."""


class DriverError(Exception):
    """The request cannot be served; the text says what was wanted, what was found and what to do."""
