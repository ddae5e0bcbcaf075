"""Parts of saving: the pace, the copy, arrays in parts, checksums, which checkpoints are kept."""
