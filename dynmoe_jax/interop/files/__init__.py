"""Files of other projects: tensors, GGUF and tokenizers, read and written."""
