"""Groups of verbs that launch.py takes in: options and lazy imports, no logic."""
