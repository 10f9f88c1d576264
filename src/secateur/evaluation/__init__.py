"""Evidence: what a model is worth, before and after."""
