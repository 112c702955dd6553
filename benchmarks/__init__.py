"""Measurements of what is claimed about speed: every module is a command with `--help`, see `make bench`."""
