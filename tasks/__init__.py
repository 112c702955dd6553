"""Prefect tasks around the core: seed, train epoch, evaluate, score, store."""
