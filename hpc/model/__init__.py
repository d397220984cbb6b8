"""transformers models, built from a configuration or loaded, and what their routers do."""
