"""Flows that compose the tasks: a run, an experiment, a group; and the command line `danling`."""
