"""Teachers elsewhere: what servers of a model tell of it over HTTP."""
