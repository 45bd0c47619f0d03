"""Recipes, run folders, progress, errors: how every command is configured and where it writes."""
