"""What the shim refuses, in words for the operator who typed the docker command."""


class DriverError(Exception):
    """The request cannot be served; the text says what was wanted, what was found and what to do."""


class PluginError(DriverError):
    """A plugin refused; `code` is the CNI error's, 0 where it gave none."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code
