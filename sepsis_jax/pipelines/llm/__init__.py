"""Three-stage training of a language model that treats simulated patients."""
