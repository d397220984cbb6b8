"""Text to tokens on disk, mixtures of them, and a loader whose position is a number."""
