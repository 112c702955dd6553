"""Every crash point of the protocols on disk and in stores, built and tried: see docs/crash-points.md."""
