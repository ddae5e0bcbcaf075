"""Log of a run: metrics of each step, progress, hardware, closing tables."""
