"""Interface plugins: they make an interface inside the container."""
