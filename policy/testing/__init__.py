"""Tiny language models for tests and demos, made without a network."""
