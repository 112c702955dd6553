"""What a run reports: the history of results, scores, and how they are shown. Loads no torch."""
