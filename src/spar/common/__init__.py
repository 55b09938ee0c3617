"""Shared by all packages: configurations, errors, limits, devices, autocast, threads."""
