"""Every setting with its default, its meaning and its values, once: frozen dataclasses that check themselves.

`Config` is the whole run; the parts that know nothing of each other are in `laep_jax/config_parts.py`. A `.gin`
file or the command line states differences only (`laep_jax/gin_config.py`); a checkpoint carries the dictionary form,
so a pruned model, whose `ModelConfig.num_experts` differs by layer, is rebuilt at its own size. Imports no JAX.
"""

import dataclasses
import typing

from laep_jax.config_parts import AuxLossConfig, DataConfig, LaepConfig, OptimizerConfig, TrainConfig
from laep_jax.errors import UserError, require
from laep_jax.fields import check_fields, fixed, free

MAX_LAYERS, MAX_CPU_DEVICES = 10_000, 1_024  # more are a slip, and would take memory before anything is checked
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder of the paper (Appendix A.1), layer by layer."""

    vocab_size: int = fixed(384, "token ids; 256 bytes and an end of document, padded to a multiple of 128", low=1)
    num_layers: int = fixed(4, "transformer layers", low=1, high=MAX_LAYERS)
    hidden_size: int = fixed(128, "width of the residual stream; even with lfa=True", low=1)
    num_heads: int = fixed(4, "attention heads", low=1)
    num_kv_heads: int | None = fixed(
        None, "heads of keys and values, each for as many query heads; None: one for each query head", low=1
    )
    head_dim: int = fixed(32, "size of a head; even, for rotary embedding turns pairs", low=2)
    qk_norm: str = fixed(
        "none",
        "RMSNorm of queries and keys before the rotary embedding: of each head as in Qwen3, or of all heads together as"
        " in OLMoE",
        choices=("none", "head", "whole"),
    )
    ffn_size: int = fixed(256, "hidden size of one expert", low=1)
    num_experts: tuple[int, ...] | int = fixed(16, "routed experts: one number for all layers, or one a layer", low=1)
    top_k: int = fixed(2, "experts that a token is sent to", low=1)
    router_score: str = fixed(
        "softmax",
        "what experts are chosen and weighted by: the softmax over all experts, or as in DeepSeek-V3 a sigmoid of each",
        choices=("softmax", "sigmoid"),
    )
    norm_topk_prob: bool = fixed(
        True,
        "weights of a token's experts add up to one; with top_k=1 they never do, since the router would learn nothing",
    )
    shared_ffn_size: int = fixed(
        0, "hidden size of an expert that takes every token beside the routed ones; 0: none", low=0
    )
    lfa: bool = fixed(True, "localized filtering-based attention: causal convolutions before queries and keys")
    lfa_bias: bool = fixed(False, "a bias in those convolutions")
    rope_base: float = fixed(1e6, "base of the rotary embedding's wavelengths", above=1)
    norm_eps: float = fixed(1e-6, "epsilon of RMSNorm", above=0)
    tie_embeddings: bool = fixed(False, "one table for the input and, transposed, for the logits")
    router_init: float = fixed(
        0.02,
        "standard deviation of the router's initial weights; too small, and a few experts take nearly all tokens",
        above=0,
    )
    dtype: str = fixed(
        "float32",
        "of activations and matmul operands; parameters and optimizer state stay float32",
        choices=("float32", "bfloat16"),
    )
    layers: str = free("scan", "run the layers as one lax.scan, or unroll them", choices=("scan", "unrolled"))
    remat: str = free(
        "none",
        "what the backward pass recomputes: nothing, each layer, or all but the dispatched tokens",
        choices=("none", "full", "save_dispatch"),
    )
    dispatch: str = free(
        "all_gather",
        "how tokens reach their experts' devices; ragged_all_to_all needs TPU or GPU",
        choices=("all_gather", "ragged_all_to_all"),
    )
    receive_buffer: float | None = free(
        None,
        "rows a device has room for in the ragged all-to-all, in units of what equal loads bring; more go in parts,"
        " and after a prune it follows the loads; None: room for all rows of the expert-parallel group",
        low=1,
    )
    grouped_matmul: str = free(
        "auto",
        "how the experts' products are computed; auto: blocks on CPU, megablox on TPU, ragged_dot elsewhere",
        choices=("auto", "blocks", "megablox", "ragged_dot"),
    )

    def __post_init__(self):
        check_fields(self)
        if isinstance(self.num_experts, int):
            object.__setattr__(self, "num_experts", (self.num_experts,) * self.num_layers)
        require(
            len(self.experts_per_layer) == self.num_layers,
            "ModelConfig.num_experts",
            self.num_experts,
            f"needs one entry for each of num_layers={self.num_layers}",
        )
        for layer, count in enumerate(self.experts_per_layer):
            require(count >= self.top_k, f"ModelConfig.num_experts[{layer}]", count, f"is below top_k={self.top_k}")
        require(self.head_dim % 2 == 0, "ModelConfig.head_dim", self.head_dim, "must be even (rotary pairs)")
        require(
            self.num_heads % self.kv_heads == 0,
            "ModelConfig.num_kv_heads",
            self.num_kv_heads,
            f"does not divide num_heads={self.num_heads}",
        )
        require(
            not self.lfa or self.hidden_size % 2 == 0,
            "ModelConfig.hidden_size",
            self.hidden_size,
            "must be even with lfa=True",
        )

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """`num_experts`, always as a tuple with one entry a layer."""
        assert isinstance(self.num_experts, tuple)
        return self.num_experts

    @property
    def kv_heads(self) -> int:
        """`num_kv_heads`, always as a number."""
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes. The batch is split over all three."""

    data: int = free(1, "devices along `data`, over which parameters are replicated", low=1)
    fsdp: int | None = free(
        None, "devices along `fsdp`, over which parameters are sharded; None: the devices that the others leave", low=1
    )
    expert: int | None = free(
        None, "devices along `expert`, the expert-parallel degree; None: as many as each layer has experts for", low=1
    )
    cpu_devices: int = free(
        8,
        "emulated devices on a machine without accelerators; the processes of a run share them",
        low=1,
        high=MAX_CPU_DEVICES,
    )

    def __post_init__(self):
        check_fields(self)

    def resolve(self, num_devices: int, num_experts: tuple[int, ...]) -> "MeshConfig":
        """The same mesh with every size filled in; refuses one that does not fit the devices.

        An open `expert` becomes the largest divisor of the remaining devices of which each has an expert of
        every layer; an open `fsdp` becomes the rest.
        """
        given = self.data * (self.fsdp or 1) * (self.expert or 1)
        sizes = f"data={self.data}, fsdp={self.fsdp}, expert={self.expert}"
        emulated = "; without accelerators MeshConfig.cpu_devices are emulated"
        require(num_devices % given == 0, "MeshConfig", sizes, f"does not divide {num_devices} devices{emulated}")
        left, fewest = num_devices // given, min(num_experts)
        expert = self.expert or max(degree for degree in range(1, fewest + 1) if left % degree == 0)
        fsdp = self.fsdp or num_devices // (self.data * expert)
        require(
            self.data * fsdp * expert == num_devices,
            "MeshConfig",
            f"data={self.data}, fsdp={fsdp}, expert={expert}",
            f"makes {self.data * fsdp * expert} places, but there are {num_devices} devices",
        )
        for layer, count in enumerate(num_experts):
            require(count >= expert, f"ModelConfig.num_experts[{layer}]", count, f"is below MeshConfig.{expert=}")
        return dataclasses.replace(self, fsdp=fsdp, expert=expert)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. `Config.from_dict(config.to_dict()) == config`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    aux_loss: AuxLossConfig = dataclasses.field(default_factory=AuxLossConfig)
    laep: LaepConfig = dataclasses.field(default_factory=LaepConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    def __post_init__(self):
        alpha, layers = self.laep.alpha, self.model.num_layers
        require(
            not isinstance(alpha, tuple) or len(alpha) == layers,
            "LaepConfig.alpha",
            alpha,
            f"needs one entry for each of num_layers={layers}",
        )
        constant = self.train.num_steps - self.decay_steps
        require(
            self.optimizer.schedule != "wsd" or constant >= self.optimizer.warmup_steps,
            "OptimizerConfig.decay_fraction",
            self.optimizer.decay_fraction,
            f"leaves {constant} of num_steps={self.train.num_steps} before the decay, fewer than "
            f"warmup_steps={self.optimizer.warmup_steps}",
        )

    @property
    def decay_steps(self) -> int:
        """Of schedule="wsd": the last ones, in which the learning rate falls."""
        return round(self.optimizer.decay_fraction * self.train.num_steps)

    def resolve(self, num_devices: int) -> "Config":
        """The config with its mesh fitted to `num_devices`; checks the batch against it."""
        mesh = self.mesh.resolve(num_devices, self.model.experts_per_layer)
        rows = num_devices * self.train.grad_accumulation
        require(
            self.data.batch_size % rows == 0,
            "DataConfig.batch_size",
            self.data.batch_size,
            f"is not divisible by {num_devices} devices x grad_accumulation={self.train.grad_accumulation}",
        )
        return dataclasses.replace(self, mesh=mesh)

    def with_num_experts(self, num_experts: tuple[int, ...]) -> "Config":
        """The same run with other expert counts, one a layer."""
        return dataclasses.replace(self, model=dataclasses.replace(self.model, num_experts=num_experts))

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "Config":
        parts = typing.get_type_hints(cls)
        unknown = set(values) - set(parts)
        if unknown:
            raise UserError(f"config has unknown parts: {', '.join(sorted(unknown))}")
        try:
            return cls(**{name: parts[name](**part) for name, part in values.items()})
        except TypeError as error:
            raise UserError(f"config does not fit this version of laep_jax: {error}") from error
