"""Pipelines behind the commands: they read files, compute and write files."""
