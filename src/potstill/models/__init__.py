"""Loading, checking, decoding, operations, ranks."""
