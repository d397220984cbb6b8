"""Starting from what exists: checkpoints fetched, read range by range, and dense models made sparse."""
