"""The store of a node in a cluster: its own rows, in SQLite, as for one host.

What the nodes must agree on stands in etcd and is brought into step by `ipamd.member`: pools and blocks in an order
that a crash cannot spoil (see there), addresses of pools of mode cluster-address by errands, which are rows of the same
commit as the allocation that they follow from. So whatever ends the process, the rows say what etcd is yet to be told.
"""

from ipamd.store.sqlite import SqliteStore


class ClusterStore(SqliteStore):
    """See `ipamd.store.base.Store`."""

    kind = "etcd"
