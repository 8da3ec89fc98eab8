"""Sets JAX's process-wide switches as training needs them, whatever a shell or notebook has set."""

import jax

from laep_jax.errors import require

NEEDED = {
    "jax_enable_x64": False,  # state and checkpoints are of 32 bits
    "jax_numpy_dtype_promotion": "standard",
    "jax_disable_jit": False,  # the step is compiled before it runs
    "jax_default_prng_impl": "threefry2x32",  # of the initial parameters, which the seed alone shall decide
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}
SET_BY_COMMAND = [name for name in NEEDED if name != "jax_disable_jit"]  # that one is set to look for a fault


def set_switches() -> None:
    """For a program of laep_jax's own, in which nobody else uses JAX."""
    for name in SET_BY_COMMAND:
        jax.config.update(name, NEEDED[name])


def require_switches() -> None:
    """`UserError` where a switch would change the types of training, or keep its step from being compiled."""
    for name, needed in NEEDED.items():
        value = getattr(jax.config, name)
        value = getattr(value, "value", value)  # an enum in newer JAX
        require(value == needed, name.upper(), value, f"must be {needed}, also by jax.config.update({name!r}, ...)")
