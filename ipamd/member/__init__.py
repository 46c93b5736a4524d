"""ipamd as one of a cluster: what several nodes must agree on stands in etcd, all else stays with the node.

`member` joins and keeps the node's record, `mirror` brings pools and reservations, `blocks` claims and gives back what
`holdings` keeps in the ledger, `publish` tells others what is in use, `nodes` is what an operator does with nodes.
"""
