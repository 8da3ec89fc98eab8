"""Eight emulated CPU devices, strict rank promotion; warnings are errors (pyproject.toml).

Programs that are compiled are kept for the session: the same tiny model is trained again and again, also by processes
that tests start.
"""

import os
import tempfile

programs = tempfile.TemporaryDirectory(prefix="programs-")
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", programs.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax  # noqa: E402

from laep_jax.sharding import make_cpu_devices  # noqa: E402

make_cpu_devices(8)
jax.config.update("jax_numpy_rank_promotion", "raise")
