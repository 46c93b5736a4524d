"""IPAM plugins: they say which addresses an interface gets."""
