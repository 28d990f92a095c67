"""The slow, obvious model in plain PyTorch float32: the oracle and the trainer. No fast path imports it."""
