"""The Flax models: architecture, training, metrics, checkpoints."""
