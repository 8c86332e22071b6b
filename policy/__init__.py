"""What is done next? Policies behind one protocol."""
