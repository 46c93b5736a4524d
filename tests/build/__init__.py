"""Tests of the bundle, the installation, the units and the package."""
