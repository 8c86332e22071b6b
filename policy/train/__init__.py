"""Training of language models: dialogues as token sequences, losses, one loop for all stages."""
