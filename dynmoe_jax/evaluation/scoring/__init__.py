"""Scores and texts of many requests at once, over trees of their prefixes."""
