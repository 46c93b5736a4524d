"""Plugins as a runtime executes them, in real namespaces."""
