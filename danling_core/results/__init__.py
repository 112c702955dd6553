"""Results of a run: their history, scores, and text formats. Loads no torch."""
