"""Post-training quantization, and proof that it did what it says."""
