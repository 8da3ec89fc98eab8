"""Layer-Adaptive Expert Pruning (arXiv 2601.14327) for pre-training MoE models in JAX."""
