"""Text and image tokenizers and the vocabulary that joins them."""
