"""A recipe at a size that fits the machine at hand: the same stages and code paths, numbers cut, every cut listed."""
