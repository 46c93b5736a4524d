"""The executables that a container runtime calls, and the CNI protocol around them (spec 0.1.0 to 1.1.0)."""
