"""Reinforcement learning from the ground: the same advantages serve small environments and language models."""
