"""Raw text to batches: sources, token shards, mixtures, packing; deterministic, resumable, documents kept apart."""
