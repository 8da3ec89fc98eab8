"""Layer-Adaptive Expert Pruning (arXiv 2601.14327) for pre-training MoE models in JAX."""

__version__ = "0.2.0"  # pyproject.toml reads it here
