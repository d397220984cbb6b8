"""What is measured while a stage runs: metrics.jsonl first, Weights & Biases as its mirror."""
