"""Tests of the cni package."""
