"""One distillation, from a recipe to a student."""
