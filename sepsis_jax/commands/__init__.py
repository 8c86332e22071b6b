"""The commands of `sepsis-jax`; heavy imports wait until a command runs."""
