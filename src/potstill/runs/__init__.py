"""The run folder, written and read. Knows no torch."""
