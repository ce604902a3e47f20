"""Plans of runs, from configurations alone."""
