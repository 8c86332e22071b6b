"""How fast the simulator is, beside torch and beside what the machine can do at most."""
