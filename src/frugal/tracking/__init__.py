"""After a run: read, compare, draw. Starts without torch."""
