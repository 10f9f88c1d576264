"""Models: their anatomy, where their blocks come from, and checkpoints as files."""
