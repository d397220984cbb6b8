"""The one training loop, its engine, schedules and checkpoints; pretraining and LoRA share it."""
