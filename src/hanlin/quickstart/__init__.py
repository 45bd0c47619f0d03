"""Raw text to a chat model, stage by stage, each skipped when its output is there and its inputs have not changed."""
