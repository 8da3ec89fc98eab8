"""Models of Hugging Face Transformers, out and in: which there are, where their tensors are, and reading them."""
