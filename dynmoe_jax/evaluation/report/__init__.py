"""Reports: the page of a run, and the page of its tasks."""
