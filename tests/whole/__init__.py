"""Tests of real processes, servers and stores."""
