"""Cross-entropy without the logits of all tokens at once."""
