"""Benchmarks: this software against a limit or a peer, measured in one run."""
