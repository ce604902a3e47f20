"""Following a run: trackers, and signs that something is wrong."""
