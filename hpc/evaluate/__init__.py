"""How good a model is: held-out loss, and text that a person can read."""
