"""How ranks work together: process group, collectives, seeds, and the agreement to stop."""
