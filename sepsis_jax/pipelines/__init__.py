"""Jobs that go through the whole house."""
