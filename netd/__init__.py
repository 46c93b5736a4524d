"""The node's network daemon: routes and tunnels to other hosts."""
