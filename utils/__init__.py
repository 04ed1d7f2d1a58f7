"""What the scripts share: arguments, training, checkpoints, logs and metrics."""
