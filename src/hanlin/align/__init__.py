"""Supervised fine-tuning (later rewards, preferences, on-policy RL): losses and objectives, no loop of their own."""
