"""What the daemons say about themselves: logs, metrics, health. Imports nobody of ours, and nothing else may enter."""
