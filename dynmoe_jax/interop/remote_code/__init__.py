"""PyTorch files that travel with exported models; nothing here imports them."""
