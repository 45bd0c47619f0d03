"""Synthetic conversations: a model writes what another (or itself) is then taught."""
