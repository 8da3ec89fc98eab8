"""Eight emulated CPU devices, strict rank promotion; warnings are errors (pyproject.toml)."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

from laep_jax.sharding import make_cpu_devices

make_cpu_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")
