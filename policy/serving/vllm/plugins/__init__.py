"""Plugins of a vLLM server, which run in its environment and import the standard library only."""
