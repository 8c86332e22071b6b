"""Training data of language models: questions, demonstrations, packed sequences, cache."""
