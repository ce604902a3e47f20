"""From examples to prompts in token ids."""
