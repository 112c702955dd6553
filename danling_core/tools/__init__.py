"""What the command line does with finished runs: verify, reproduce, prune, copy."""
