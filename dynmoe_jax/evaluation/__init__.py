"""Evaluation of a trained model: held-out loss by domain, tasks, perplexity, and reports."""
