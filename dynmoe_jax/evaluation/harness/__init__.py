"""Tasks of lm-evaluation-harness: the model that it asks, and its answers."""
