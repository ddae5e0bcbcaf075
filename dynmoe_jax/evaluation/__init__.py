"""What a trained model is worth: held-out loss by domain, and the report of a run."""
