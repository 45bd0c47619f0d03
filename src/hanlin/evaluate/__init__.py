"""Judge a model: held-out loss, perplexity, bits per byte, exact answers, samples."""
