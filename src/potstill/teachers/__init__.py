"""Who gives the signal: a loaded model, or a cache."""
