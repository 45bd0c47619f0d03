"""The chat page, on the same app as the server, in pure Python."""
