"""Before a run: the doctor, which examines a recipe, and recipes to begin with."""
