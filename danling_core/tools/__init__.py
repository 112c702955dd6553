"""Tools for finished runs, behind the command line: verify, reproduce, prune, copy."""
