"""Where a language model runs: here, behind vLLM, or behind any OpenAI-compatible endpoint."""
