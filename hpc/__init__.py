"""The compute node: everything that trains, adapts, shrinks and measures. Never imports `slurm`."""

__version__ = "0.1.0"
