"""From the experts that the router chose to the slots that hold them.

Axes: K top-k slots, W experts of a window, P devices of the expert axis, S slots of a device.
"""

import jax
import jax.numpy as jnp

from laep_jax.laep.layout import Layout


def to_slots(ids_K: jax.Array, layout: Layout) -> jax.Array:
    """The slot p S + s of each expert, int32 [..., K], P S for padding. Of one device it is the expert.

    ids_K: experts of the window, [..., K], W for padding. layout: of the layer.
    """
    devices, slots = layout.expert_PS.shape
    if devices == 1:  # which holds the window as it is
        return ids_K
    device_W = jnp.argmax(layout.position_WP >= 0, axis=1).astype(jnp.int32)
    slot_W = device_W * slots + jnp.take_along_axis(layout.position_WP, device_W[:, None], axis=1)[:, 0]
    return jnp.append(slot_W, jnp.int32(devices * slots))[ids_K]
