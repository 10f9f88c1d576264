"""The pipeline: tokens through a model's blocks, one block in memory at a time, pruned on the way."""
