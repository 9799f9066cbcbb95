"""The plug-in in vLLM's OpenAI server."""

WRAPPERS = {}
