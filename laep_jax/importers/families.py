"""Where families of Hugging Face models keep what belongs to an expert: names of tensors, fields of config.json.

All of it lies below one module of each layer: matrices of numbered experts, or of all together with the expert first;
the router's rows; and in some families a bias that is added to the router's scores when experts are chosen.
"""

import re

LAYER = re.compile(r"(?:.*\.)?layers\.(?P<layer>\d{1,6})\..*")
MODULE = r"(?P<module>(?:.*\.)?layers\.(?P<layer>\d{1,6})\.(?:mlp|block_sparse_moe|feed_forward))\."
NUMBERED = re.compile(MODULE + r"experts\.(?P<expert>\d{1,6})\.(?P<rest>.+)")
TOGETHER = re.compile(MODULE + r"experts\.(?!\d)[\w.]+")
ROUTER = re.compile(MODULE + r"gate\.weight")
BIAS = re.compile(MODULE + r"(?:gate|moe_statics)\.e_score_correction_bias")


NEVER = -1e9  # bias of an expert that is there to fill its layer
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")  # fields of config.json
TOP_K = ("num_experts_per_tok", "moe_k")
FAMILIES = {  # by model_type: the scores to which a bias is added, so that experts can be there and never be chosen
    "mixtral": None,
    "olmoe": None,
    "qwen3_moe": None,
    "deepseek_v2": None,
    "deepseek_v3": "sigmoid",
    "ernie4_5_moe": "softmax",
}
