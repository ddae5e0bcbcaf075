"""Conversations as text: by the marks of this project, or by a tokenizer's chat template."""
