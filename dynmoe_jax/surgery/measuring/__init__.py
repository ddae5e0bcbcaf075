"""Text of a result, statistics gathered of it, and both models measured on it."""
