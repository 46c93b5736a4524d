"""A real dockerd with the Docker shim, on a host of its own."""
