"""Several hosts on an underlay, each with its own paths, netd and containers."""
