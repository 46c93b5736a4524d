"""Daemons of a cluster as plain processes beside the test: quick to start, for what needs no network of their own."""

from collections.abc import Sequence
from pathlib import Path

from tests.ipamd.daemon import Daemon


class Node(Daemon):
    """An ipamd with a store of kind etcd. `settings` are further lines of the configuration, with their tables."""

    def __init__(
        self, directory: Path, name: str, endpoints: Sequence[str], settings: str = "", *, prefix: str = "/netloom/"
    ) -> None:
        super().__init__(directory / name)
        self.name = name
        self.config.write_text(
            f'[ipamd]\nsocket = "{self.socket}"\nnode = "{name}"\nhttp_listen = ""\n'
            f'[store]\nkind = "etcd"\npath = "{self.database}"\n'
            f'[etcd]\nendpoints = {list(endpoints)}\nprefix = "{prefix}"\n'
            f'[log]\nlevel = "info"\nformat = "json"\n{settings}'
        )
