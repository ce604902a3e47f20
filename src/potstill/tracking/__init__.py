"""Following a run while it goes on: its numbers in a tracker, and signs that something is wrong."""
