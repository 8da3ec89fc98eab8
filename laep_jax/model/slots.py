"""From the experts that the router chose to the slots that hold them, inside `jax.shard_map`.

Where experts have replicas, the devices of a group (those of the expert axis that exchange tokens) count their tokens,
split each expert's so that the devices' loads become even (`laep.slots` plans where replicas are; this is the step's
part of it), and send each token to one of its expert's slots: those on the sender's own device first, then the others
in the order of senders. Everything follows from the counts, so all devices of a group come to the same result.

Axes: T tokens of a device, K top-k slots, M = T K choices, W experts of a window, P devices of the expert axis, S slots
of a device.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from laep_jax.laep.layout import Layout
from laep_jax.laep.slots import level_in_rounds

AXIS = "expert"
SLOTS_NAME = "moe_slots"  # of slot ids, for checkpoint policies: small, and many small operations to make again


def to_slots(ids_TK: jax.Array, counts_W: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The slot p S + s of each choice and the choices that this device receives.

    Args:
      ids_TK: experts of the window, W for padding. counts_W: how often this device's tokens chose each. layout: of
        the layer.

    Returns:
      int32 [T, K], P S for padding, and an int32 scalar. Of one device slots are the experts of the window.
    """
    (devices, slots), width = layout.expert_PS.shape, counts_W.size
    if devices == 1:  # which holds the window as it is
        return ids_TK, jnp.sum(counts_W)
    ids_M = ids_TK.reshape(-1)
    if slots > -(-width // devices):
        device_M, received = _replicas(ids_M, counts_W, layout)
    else:
        device_W = jnp.argmax(layout.position_WP >= 0, axis=1).astype(jnp.int32)
        device_M = jnp.append(device_W, 0)[ids_M]
        here_W = device_W == jax.lax.axis_index(AXIS)
        received = jnp.sum(jnp.where(here_W, jax.lax.psum(counts_W, AXIS), 0))
    position_WP = jnp.concatenate([layout.position_WP, jnp.zeros((1, devices), jnp.int32)])
    slot_M = device_M * slots + position_WP[ids_M, device_M]
    slot_M = checkpoint_name(jnp.where(ids_M < width, slot_M, devices * slots), SLOTS_NAME)
    return slot_M.reshape(ids_TK.shape), received


def _replicas(ids_M: jax.Array, counts_W: jax.Array, layout: Layout) -> tuple[jax.Array, jax.Array]:
    """The device of each choice, any for padding, and the choices that this one receives."""
    me, last = jax.lax.axis_index(AXIS), counts_W.size - 1
    counts_PW = jax.lax.all_gather(counts_W, AXIS)  # by sender
    total_W = jnp.sum(counts_PW, axis=0)
    quota_PW = _quotas(total_W, layout).T  # by receiver
    own_PW = jnp.minimum(counts_PW, quota_PW)  # stay on the sender's device
    away_PW = counts_PW - own_PW
    first_W = (jnp.cumsum(away_PW, axis=0) - away_PW)[me]  # of those of all senders that go away, this one's first
    end_PW = jnp.cumsum(quota_PW - own_PW, axis=0)  # of those that each receiver takes of them
    expert_M = jnp.minimum(ids_M, last)
    away_M = _rank_within_expert(ids_M, counts_W) - own_PW[me][expert_M]
    place_M = first_W[expert_M] + away_M
    receiver_M = jnp.sum(place_M[None] >= end_PW[:, expert_M], axis=0, dtype=jnp.int32)
    receiver_M = jnp.minimum(receiver_M, len(counts_PW) - 1)
    return jnp.where(away_M < 0, me, receiver_M), jnp.sum(quota_PW[me])


def _rank_within_expert(ids_M: jax.Array, counts_W: jax.Array) -> jax.Array:
    """How many earlier choices of this device are of the same expert; padding is not looked at."""
    order_M = jnp.argsort(ids_M, stable=True)
    place_M = jnp.zeros_like(order_M).at[order_M].set(jnp.arange(ids_M.size), unique_indices=True)
    first_W = jnp.cumsum(counts_W) - counts_W
    return place_M - first_W[jnp.minimum(ids_M, counts_W.size - 1)]


def _quotas(total_W: jax.Array, layout: Layout) -> jax.Array:
    """How many of an expert's choices each device takes, int32 [W, P]; they add up to `total_W`."""
    total_W1 = total_W[:, None].astype(jnp.float32)
    planned_WP = jnp.asarray(layout.share_WP) * total_W1
    load_WP = level_in_rounds(planned_WP, layout.position_WP >= 0, jnp, jax.lax.fori_loop)
    up_to_WP = jnp.cumsum(load_WP, axis=1)
    share_WP = up_to_WP / jnp.maximum(up_to_WP[:, -1:], jnp.finfo(jnp.float32).tiny)  # ends with 1, or is 0 everywhere
    return jnp.diff(jnp.rint(share_WP * total_W1).astype(jnp.int32), axis=1, prepend=0)
