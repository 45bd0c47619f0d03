"""Web pages in pure Python (NiceGUI) on the server's own app, offline, English and Chinese."""
