"""What is claimed about speed, measured: every module is a command with `--help`, see `make bench`."""
