"""The run directory: every path, receipts, attempts, atomic writes and hashes. Imports nothing heavy."""
