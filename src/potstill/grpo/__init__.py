"""Reinforcement learning from a checkpoint."""
