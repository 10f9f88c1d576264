"""Results as tables for a terminal, and progress."""
