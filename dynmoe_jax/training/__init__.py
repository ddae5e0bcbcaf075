"""The training loop and all that it stands on: step, objective, gradients, optimizer."""
