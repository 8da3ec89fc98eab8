"""Recognises a router that has collapsed: experts that every token goes to, whatever the token.

Axes: E experts.
"""

import numpy as np

NEARLY_ALL = 0.99  # of a layer's tokens


def collapsed(tokens_E: np.ndarray, top_k: int) -> int:
    """How many experts of a layer take nearly all of its tokens each; 0 where the router distinguishes tokens.

    A token goes to top_k different experts, so no expert takes more than all tokens: its max / mean is then E / top_k,
    the most there can be, and the token no longer decides anything about it. One such expert is enough, however evenly
    the other choices are spread. Routing that is skewed and still learns, as early in training, stays below.

    Args:
      tokens_E: assignments by expert, of one step or more. top_k: experts that a token goes to.

    >>> collapsed(np.array([100, 100, 60, 40, 0, 0, 0, 0]), top_k=3), collapsed(np.array([90, 30, 30, 50]), top_k=2)
    (2, 0)
    """
    num_tokens = np.sum(tokens_E) / top_k
    if len(tokens_E) == top_k or num_tokens == 0:
        return 0
    return int(np.sum(tokens_E >= NEARLY_ALL * num_tokens))
