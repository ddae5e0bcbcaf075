"""Page, terminal tables and record of a result."""
