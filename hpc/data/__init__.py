"""Text to tokens on disk, and a loader whose position is a number."""
