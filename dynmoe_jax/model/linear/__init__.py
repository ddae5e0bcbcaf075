"""Linear maps of the model: their products, and kinds of matrices, one file each."""
