"""Plugins that are chained after one that makes an interface: they get its result and pass it on."""
