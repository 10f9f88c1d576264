"""How results are shown: pure functions of recorded data."""
