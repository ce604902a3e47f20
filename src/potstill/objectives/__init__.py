"""The loss of a batch."""
