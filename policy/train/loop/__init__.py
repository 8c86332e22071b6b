"""The training loop: learner, optimizer, checkpoints, metrics, processes, publishing."""
