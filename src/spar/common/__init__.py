"""What every package may use: configurations, errors, limits, devices, autocast, threads."""
