"""Addresses and networks from text, each parsed once: a request reads the few that it has again and again, and so does
the next one of its network. What is no address raises ValueError, as in the module ipaddress.
"""

import functools
import ipaddress

interface = functools.lru_cache(maxsize=128)(ipaddress.ip_interface)
address = functools.lru_cache(maxsize=128)(ipaddress.ip_address)
network = functools.lru_cache(maxsize=128)(functools.partial(ipaddress.ip_network, strict=False))
