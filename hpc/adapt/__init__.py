"""Low-rank adapters: attach, save, merge."""
