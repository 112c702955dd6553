"""Which code, which run: the ids, and the state of the code that they come from."""
