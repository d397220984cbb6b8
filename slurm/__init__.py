"""The login node: everything that submits, watches and decides. Never imports torch, transformers or deepspeed."""
