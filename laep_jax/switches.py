"""Sets JAX's process-wide switches as training needs them, whatever a shell or notebook has set."""

import jax

from laep_jax.errors import require

NEEDED = {
    "jax_enable_x64": False,  # state and checkpoints are of 32 bits
    "jax_numpy_dtype_promotion": "standard",
    "jax_disable_jit": False,  # the step is compiled before it runs
}
SET_BY_COMMAND = ("jax_enable_x64", "jax_numpy_dtype_promotion")  # not jax_disable_jit, set to look for a fault


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
