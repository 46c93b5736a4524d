"""A certificate authority for one test, made with openssl: a server's certificate and a client's."""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_KEY = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True, slots=True)
class Pair:
    """Files of a certificate and its key."""

    cert: str
    key: str


class Authority:
    """Writes everything below `directory`/tls. `names`: addresses and host names of the server."""

    def __init__(self, directory: Path, names: Sequence[str], client: str = "netloom") -> None:
        self._place = directory / "tls"
        self._place.mkdir(exist_ok=True)
        self.ca = str(self._place / "ca.pem")
        own = ["req", "-x509", *_KEY, "-keyout", self._file("ca.key"), "-out", self.ca, "-days", "2"]
        self._openssl([*own, "-subj", "/CN=tests"])
        self.server = self.issue("server", names)
        self.client = self.issue(client)

    def issue(self, name: str, names: Sequence[str] = ()) -> Pair:
        """A certificate for both ends of a connection, with this common name."""
        pair = Pair(self._file(f"{name}.pem"), self._file(f"{name}.key"))
        request, extensions = self._file(f"{name}.csr"), self._file(f"{name}.ext")
        lines = ["extendedKeyUsage=serverAuth,clientAuth"]
        if names:
            lines.append("subjectAltName=" + ",".join(_alternative(word) for word in names))
        Path(extensions).write_text("\n".join(lines) + "\n", encoding="ascii")
        self._openssl(["req", *_KEY, "-keyout", pair.key, "-out", request, "-subj", f"/CN={name}"])
        signing = ["-CA", self.ca, "-CAkey", self._file("ca.key"), "-CAcreateserial", "-days", "2"]
        self._openssl(["x509", "-req", "-in", request, "-out", pair.cert, *signing, "-extfile", extensions])
        return pair

    def _file(self, name: str) -> str:
        return str(self._place / name)

    @staticmethod
    def _openssl(arguments: Sequence[str]) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)


def _alternative(name: str) -> str:
    try:
        return f"IP:{ipaddress.ip_address(name)}"
    except ValueError:
        return f"DNS:{name}"
