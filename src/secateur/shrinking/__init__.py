"""Smaller dense models: neurons, attention heads, experts and whole blocks removed from a checkpoint."""
