"""Models measured on a task or any prompts."""
