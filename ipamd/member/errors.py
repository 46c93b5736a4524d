"""Why a node cannot be one of its cluster."""


class JoinError(Exception):
    """Another attempt will not help until an operator has acted; the text says how."""
