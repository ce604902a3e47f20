"""The commands `potstill cache`."""
