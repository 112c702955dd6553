"""Runs to learn from; every one trains on data that ships with a package."""
