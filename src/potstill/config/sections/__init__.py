"""The sections of a recipe, each checked by itself. The text below a field is its help."""
