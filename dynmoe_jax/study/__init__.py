"""The study of the paper's claims: its models trained alike, measured, and answered."""
