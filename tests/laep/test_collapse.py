import numpy as np
import pytest

from laep_jax.laep.collapse import collapsed


@pytest.mark.parametrize(
    ("tokens_E", "top_k", "experts"),
    [
        ([1000, 1000, 0, 0], 2, 2),
        ([999, 991, 8, 2], 2, 2),
        ([1000, 1000, 210, 190, 200, 150, 130, 120], 3, 2),  # the third choice still differs
        ([1000, 0, 0], 1, 1),
        ([900, 500, 300, 300], 2, 0),  # max / mean 1.8 of 2
        ([500, 500, 500, 500], 2, 0),
        ([0, 0, 0, 0], 2, 0),  # a layer without tokens
        ([700, 700], 2, 0),  # no others to choose
    ],
)
def test_a_router_has_collapsed_where_an_expert_takes_nearly_every_token(tokens_E, top_k, experts):
    assert collapsed(np.array(tokens_E), top_k) == experts
