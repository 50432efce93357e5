"""Lightning modules and what they need: losses, optimizers, checkpoints, strategies."""
