"""One opening of a run: its claim, every guarded write, its upload and its end. Loads no torch."""
