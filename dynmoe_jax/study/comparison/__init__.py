"""Trainings of the study: models, sizes, the runs and what decides their settings, their price."""
