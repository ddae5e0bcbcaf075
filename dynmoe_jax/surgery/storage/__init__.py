"""Models on disk: parents that are read, and the result that is written."""
