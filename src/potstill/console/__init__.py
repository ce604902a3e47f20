"""Text for people: errors, names, progress."""
