"""The one door to Linux: rtnetlink, nftables, namespaces, sysctls, and the paths that every process agrees on.

Imports nobody of ours. Nothing is imported here, so that a short-lived plugin pays only for the modules that it uses.
"""
