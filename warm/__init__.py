"""The way into the plugins that costs no start of Python: a C launcher, a master and its warm workers."""
