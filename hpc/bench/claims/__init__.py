"""What others say that greener AI saves, re-run or recomputed: one file for each claim (`launch.py bench claims`)."""
