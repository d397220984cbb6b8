"""Whether a finished model fits a machine, how fast it answers there and what its format costs: arithmetic, no torch."""
