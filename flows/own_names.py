"""Importing this raises `NamesShadowed` where another `tasks` hides ours: flows import it before any task."""

from flows.names import check_names

check_names()
