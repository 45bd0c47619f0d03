"""Pure building blocks: attention, masks, positions, norms, feed-forward, token losses. No config files, no I/O."""
