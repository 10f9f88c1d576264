"""How packed checkpoints run: a linear layer that stays packed, and the hook by which transformers finds it."""
