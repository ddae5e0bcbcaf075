"""Processes that train and measure, and how long they take."""
