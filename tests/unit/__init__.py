"""Tests without processes of their own."""
