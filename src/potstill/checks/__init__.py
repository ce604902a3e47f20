"""Checks of what a run is about to use."""
