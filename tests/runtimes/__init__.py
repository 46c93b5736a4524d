"""podman and containerd, as Debian packages them, with our plugins."""
