"""Health of a run: anomalies, skipped updates, rollbacks, NaN reports, memory."""
