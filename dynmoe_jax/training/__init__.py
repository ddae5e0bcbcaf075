"""The training loop and all that it stands on: step, optimizer, checkpoint, metrics, mesh."""
