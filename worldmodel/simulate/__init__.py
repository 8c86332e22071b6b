"""Playing patients forward in the world model."""
