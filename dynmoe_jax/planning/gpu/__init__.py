"""Plans for NVIDIA GPUs, by a roofline."""
