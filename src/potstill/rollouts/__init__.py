"""Who writes the prefixes, and batches of them."""
