"""Decoding, here or elsewhere."""
