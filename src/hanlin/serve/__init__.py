"""The OpenAI-compatible server: models behind HTTP, validated by OpenAI's own client."""
