"""Preparation: documents become one TFDS data set, with held-out splits."""
