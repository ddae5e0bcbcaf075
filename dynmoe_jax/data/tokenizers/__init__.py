"""Tokenizers: SentencePiece, Hugging Face's, and the interface of both."""
