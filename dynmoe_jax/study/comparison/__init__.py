"""What the study trains: models, sizes, the runs and what decides their settings, their price."""
