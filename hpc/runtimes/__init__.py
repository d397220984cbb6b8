"""Programs that run a finished model: transformers, llama.cpp, MLX. One door each, behind one protocol."""
