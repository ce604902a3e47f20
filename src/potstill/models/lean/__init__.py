"""The same with less time or memory: results differ by rounding at most."""
