"""Tests of the Docker shim that need neither root nor Docker."""
