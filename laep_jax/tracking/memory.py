"""The most memory that a run has used."""

import resource
import sys

import jax


def peak_memory_bytes(device: jax.Device) -> int:
    """Of the device, where its platform counts; of this process on the host elsewhere. Since the process started."""
    stats = device.memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
