"""What a plugin answers when it cannot do what was asked: a code, a message, details.

Codes 0 to 99 are the specification's (SPEC.md, section "Error"); from 100 on they are ours, and 999 is the reference
library's word for "internal". A runtime acts on the code, an operator on the text: what was wanted, what was found,
what to do.
"""

from enum import IntEnum


class Code(IntEnum):
    """Error codes. 8 and 999 are not in the specification's table; the reference library has them as constants."""

    INCOMPATIBLE_VERSION = 1
    UNSUPPORTED_FIELD = 2  # the message must hold key and value
    UNKNOWN_CONTAINER = 3  # tells the runtime that it need not DEL
    INVALID_ENVIRONMENT = 4  # the message must name the variables
    IO_FAILURE = 5
    DECODING_FAILURE = 6
    INVALID_CONFIG = 7
    INVALID_NETNS = 8
    TRY_AGAIN_LATER = 11
    NOT_AVAILABLE = 50  # STATUS: an ADD could not be served
    LIMITED_CONNECTIVITY = 51  # STATUS: nor may existing containers have all of their connectivity
    POOL_EXHAUSTED = 100
    ADDRESS_UNAVAILABLE = 101
    POOL_CONFLICT = 102
    PORT_UNAVAILABLE = 103
    INTERNAL = 999


class CniError(Exception):
    """The answer to a request that failed.

    Args:
        code: one of Code, or what a delegate answered.
        msg: one short sentence.
        details: more, if there is more.
    """

    def __init__(self, code: int, msg: str, details: str = "") -> None:
        super().__init__(code, msg, details)
        self.code = int(code)
        self.msg = msg
        self.details = details

    def __str__(self) -> str:
        """Message and details in one line, as the reference's types.Error prints them."""
        return f"{self.msg}; {self.details}" if self.details else self.msg

    def document(self, version: str) -> dict[str, object]:
        """The JSON object of the specification's section "Error".

        The specification asks for cniVersion, the reference leaves it out; runtimes ignore keys they do not know.
        """
        answer: dict[str, object] = {"cniVersion": version, "code": self.code, "msg": printable(self.msg)}
        if self.details:
            answer["details"] = printable(self.details)
        return answer


def printable(text: str) -> str:
    """`text` as JSON can carry it: bytes of the environment that are no UTF-8 are spelled out."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def shown(text: str, limit: int = 80) -> str:
    """A foreign string as part of a message: quoted, in ASCII, at most `limit` characters of it."""
    quoted = '"' + ascii(text[:limit])[1:-1].replace('"', '\\"').replace("\\'", "'") + '"'
    return quoted if len(text) <= limit else f"{quoted}... ({len(text)} characters)"
