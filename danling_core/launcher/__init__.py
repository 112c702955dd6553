"""The launcher: a process that starts and watches groups of ranks for its driver."""
