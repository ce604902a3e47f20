"""Checks of what a run is about to use: models, prompts, loss, settings and machine."""
