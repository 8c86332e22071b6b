"""Speed of the simulator, compared with torch and with the machine's peak rate."""
