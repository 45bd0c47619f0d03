"""How weights lie on disk: one file a format. Pickle is never read or written."""
