"""The report of finished runs. Reads files and knows no torch."""
