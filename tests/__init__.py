"""Tests: `unit` needs no process but pytest's, `whole` runs real ones. Helpers lie beside the two."""
