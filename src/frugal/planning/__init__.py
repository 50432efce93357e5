"""Before a run: what it will cost. Starts without torch."""
