"""Work of several ranks together: process group, collectives, seeds, and the agreement to stop."""
