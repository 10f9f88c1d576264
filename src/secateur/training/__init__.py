"""Training with sparsity: masks that hold, pruning on the way, and recovery that keeps the zeros."""
