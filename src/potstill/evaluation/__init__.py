"""Measuring models: scores of a task, and both models on prompts."""
