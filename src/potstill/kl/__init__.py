"""Exact divergences from hidden states and heads. Imports torch and `types` alone."""
