"""Brings a run's local working folder to its remote one while it trains, and back for a resume."""
