"""The folder of a run: its files, lease, metadata and listing."""
