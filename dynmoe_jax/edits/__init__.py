"""Pure functions that turn parameters, moments and settings of one model into those of another."""
