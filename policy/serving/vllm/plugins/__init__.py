"""What runs beside or inside a vLLM server, outside this environment: standard library alone."""
