"""Teachers elsewhere, over HTTP."""
