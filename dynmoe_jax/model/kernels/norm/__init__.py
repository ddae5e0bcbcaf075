"""RMS norm, alone or fused with the product that follows it."""
