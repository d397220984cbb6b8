"""Whether a finished model fits a machine, how fast it answers there, what its format costs: no torch."""
