"""Every setting and its default, once: frozen dataclasses that check themselves when they are made.

`Config` is the whole run. A `.gin` file or the command line states differences only
(`laep_jax/gin_config.py`); a checkpoint carries the dictionary form, so a pruned model, whose
`ModelConfig.num_experts` differs by layer, is rebuilt at its own size. Imports no JAX.
"""

import dataclasses
import math
import typing

from laep_jax.checks import at_least, check_fields, in_range, one_of
from laep_jax.errors import UserError, require

DTYPES = ("float32", "bfloat16")
MOST_LAYERS, MOST_CPU_DEVICES = 10_000, 1_024  # more are a slip, and would take memory before anything is checked
BATCH_AXES = ("data", "fsdp", "expert")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder of the paper (Appendix A.1), layer by layer.

    `num_experts` has one entry a layer; an int means the same number in each.
    `layers` runs equal neighbouring layers as one `lax.scan` or unrolls it; `remat` names what the
    backward pass recomputes; neither changes parameters. `receive_buffer`: room for the rows a device
    receives in the ragged all-to-all, in units of what equal loads would bring; more goes in parts. After a
    cut it follows the loads. None: room for all rows of the expert-parallel group.
    """

    vocab_size: int = 384  # 256 bytes + end of document, padded to a multiple of 128
    num_layers: int = 4
    hidden_size: int = 128
    num_heads: int = 4
    head_dim: int = 32
    ffn_size: int = 256  # of one expert
    num_experts: tuple[int, ...] | int = 16
    top_k: int = 2
    lfa: bool = True  # localized filtering-based attention
    lfa_bias: bool = False
    rope_base: float = 1e6
    norm_eps: float = 1e-6
    router_init: float = 0.02  # standard deviation of the router's initial weights
    dtype: str = "float32"  # of activations and matmul operands; masters stay float32
    layers: str = "scan"
    remat: str = "none"
    dispatch: str = "all_gather"
    receive_buffer: float | None = None
    grouped_matmul: str = "auto"  # blocks on CPU, ragged_dot elsewhere

    def __post_init__(self):
        check_fields(self)
        at_least(self, 1, "vocab_size", "hidden_size", "num_heads", "ffn_size", "top_k")
        in_range(self, 1, MOST_LAYERS, "num_layers")
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
        require(
            self.head_dim >= 2 and self.head_dim % 2 == 0,
            "ModelConfig.head_dim",
            self.head_dim,
            "must be even and positive (rotary pairs)",
        )
        require(
            not self.lfa or self.hidden_size % 2 == 0,
            "ModelConfig.hidden_size",
            self.hidden_size,
            "must be even with lfa=True",
        )
        require(self.rope_base > 1, "ModelConfig.rope_base", self.rope_base, "must be above 1")
        require(self.norm_eps > 0, "ModelConfig.norm_eps", self.norm_eps, "must be positive")
        require(self.router_init > 0, "ModelConfig.router_init", self.router_init, "must be positive")
        one_of("ModelConfig.dtype", self.dtype, DTYPES)
        one_of("ModelConfig.layers", self.layers, ("scan", "unrolled"))
        one_of("ModelConfig.remat", self.remat, ("none", "full", "save_dispatch"))
        at_least(self, 1, "receive_buffer")
        one_of("ModelConfig.dispatch", self.dispatch, ("all_gather", "ragged_all_to_all"))
        one_of("ModelConfig.grouped_matmul", self.grouped_matmul, ("auto", "blocks", "ragged_dot"))

    @property
    def experts_per_layer(self) -> tuple[int, ...]:
        """`num_experts`, always as a tuple with one entry a layer."""
        assert isinstance(self.num_experts, tuple)
        return self.num_experts

    @property
    def runs(self) -> tuple[tuple[int, int], ...]:
        """Runs of neighbouring layers with equal expert count, as (number of layers, experts)."""
        runs: list[tuple[int, int]] = []
        for count in self.experts_per_layer:
            if runs and runs[-1][1] == count:
                runs[-1] = (runs[-1][0] + 1, count)
            else:
                runs.append((1, count))
        return tuple(runs)


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes `data`, `fsdp`, `expert`; None means: from the devices there are.

    The batch is split over all three. Parameters are sharded over `fsdp` and `expert` and repeated
    over `data`. `cpu_devices` emulated devices are made on a machine without accelerators; processes of
    one run share them.
    """

    data: int = 1
    fsdp: int | None = None
    expert: int | None = None
    cpu_devices: int = 8

    def __post_init__(self):
        check_fields(self)
        at_least(self, 1, "data", "fsdp", "expert")
        in_range(self, 1, MOST_CPU_DEVICES, "cpu_devices")

    def resolve(self, num_devices: int, num_experts: tuple[int, ...]) -> "MeshConfig":
        """The same mesh with every size filled in; refuses one that does not fit the devices.

        An open `expert` becomes the largest divisor of the remaining devices that also divides
        every layer's expert count; an open `fsdp` becomes the rest.
        """
        fixed = self.data * (self.fsdp or 1) * (self.expert or 1)
        sizes = f"data={self.data}, fsdp={self.fsdp}, expert={self.expert}"
        require(num_devices % fixed == 0, "MeshConfig", sizes, f"does not divide {num_devices} devices")
        expert = self.expert or math.gcd(num_devices // fixed, *num_experts)
        fsdp = self.fsdp or num_devices // (self.data * expert)
        require(
            self.data * fsdp * expert == num_devices,
            "MeshConfig",
            f"data={self.data}, fsdp={fsdp}, expert={expert}",
            f"makes {self.data * fsdp * expert} places, but there are {num_devices} devices",
        )
        for layer, count in enumerate(num_experts):
            require(
                count % expert == 0,
                f"ModelConfig.num_experts[{layer}]",
                count,
                f"is not divisible by MeshConfig.expert={expert}",
            )
        return dataclasses.replace(self, fsdp=fsdp, expert=expert)


@dataclasses.dataclass(frozen=True)
class AuxLossConfig:
    """Coefficients of the balancing terms, by name (notes section 5); 0 leaves a term out.

    `mixtral`: Switch / Mixtral, balanced value 1. `mixtral_hf`: the same without 1/k, balanced
    value k. `deepseek_v3`: sequence-wise. `router_z`: squared log-sum-exp of the logits.
    `loss_free_bias`: no loss but the step `u` of DeepSeek's selection bias.
    """

    mixtral: float = 0.0
    mixtral_hf: float = 0.0
    deepseek_v3: float = 0.0
    router_z: float = 0.0
    loss_free_bias: float = 0.0

    def __post_init__(self):
        check_fields(self)
        at_least(self, 0, *(field.name for field in dataclasses.fields(self)))


@dataclasses.dataclass(frozen=True)
class LaepConfig:
    """When to prune, what, and where the rest goes (paper sections 3.2, 3.3; notes 2 and 3).

    `alpha`: individual bound in units of the mean load: a number, "inf", "hybrid" (0.2 in the first
    and last sixth of the layers, 0.4 between) or one number a layer. `beta`: cumulative bound as a
    share of the layer's tokens. Windows are `window` steps long; the loads count as stable once,
    `stable_windows` times in a row and not before `min_step`, every layer's rank correlation with
    the window before and the overlap of the sets to prune reach their thresholds.
    `prune_at_step` overrides the test; `plan` names a plan.json that is then carried out instead of one made from the
    loads. `rearrange_gain`: also rearrange without pruning when that would lower the largest device load by this share
    (None: never). `placement_loads`: place by the loads of the pruned model, measured with the pruned experts masked,
    or by the recorded ones.
    `max_runs`: restore experts until neighbouring layers form at most so many runs of equal count, since
    each is compiled by itself. The cut comes `cut_delay` steps after its plan was made, in which the
    smaller model's steps are compiled beside the training. `restore`: cut through the checkpoint or in device memory.
    `reset_moments`: the optimizer's moments begin anew after a cut, instead of following their experts.
    `guard_steps` after a prune the held-out loss may be `guard_tolerance` nats above that before it; else the prune is
    undone and tried again with alpha and beta halved, `max_retries` times at most. guard_steps=None: no guard. With
    `dry_run_tolerance` the loss is also measured before anything is cut, by masking, and may rise that much.
    """

    alpha: float | str | tuple[float | str, ...] = "hybrid"
    beta: float = 0.1
    estimator: str = "vote"
    inequality: str = "le"
    rounding: str = "restore"
    placement: str = "refined"
    placement_loads: str = "masked"
    window: int = 25
    rank_correlation: float = 0.9
    overlap: float = 0.8
    stable_windows: int = 2
    min_step: int = 100
    prune_at_step: int | None = None
    plan: str = ""
    max_prunes: int = 1
    rearrange_gain: float | None = None
    max_runs: int | None = None
    cut_delay: int = 20
    restore: str = "orbax"
    reset_moments: bool = False
    guard_steps: int | None = 50
    guard_tolerance: float = 0.02
    max_retries: int = 2
    dry_run_tolerance: float | None = None

    def __post_init__(self):
        check_fields(self)
        by_layer = isinstance(self.alpha, tuple)
        alphas = self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)
        alphas = tuple("inf" if alpha == math.inf else alpha for alpha in alphas)  # JSON has no infinity
        for alpha in alphas:
            if isinstance(alpha, str):
                one_of("LaepConfig.alpha", alpha, ("inf",) if by_layer else ("inf", "hybrid"))
            else:
                require(alpha >= 0, "LaepConfig.alpha", self.alpha, "must not be negative")
        object.__setattr__(self, "alpha", alphas if by_layer else alphas[0])
        in_range(self, 0, 1, "beta", "overlap")
        in_range(self, -1, 1, "rank_correlation")
        require(not self.plan or self.prune_at_step is not None, "LaepConfig.plan", self.plan, "needs prune_at_step")
        at_least(self, 1, "window", "stable_windows", "prune_at_step", "max_runs", "guard_steps")
        at_least(self, 0, "min_step", "max_prunes", "rearrange_gain", "cut_delay", "max_retries")
        at_least(self, 0, "guard_tolerance", "dry_run_tolerance")
        one_of("LaepConfig.estimator", self.estimator, ("vote", "mean"))
        one_of("LaepConfig.inequality", self.inequality, ("le", "lt"))
        one_of("LaepConfig.rounding", self.rounding, ("restore", "prune"))
        one_of("LaepConfig.placement", self.placement, ("greedy", "refined"))
        one_of("LaepConfig.placement_loads", self.placement_loads, ("masked", "recorded"))
        one_of("LaepConfig.restore", self.restore, ("orbax", "memory"))


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into batches.

    `source`: stdlib (the running Python's own sources), text, jsonl, array_record or synthetic;
    `path`: a file, folder or glob for the middle three. `tokenizer`: "bytes" or the path of a
    Hugging Face `tokenizer.json`. `batch_size` counts sequences over all devices and processes.
    """

    source: str = "stdlib"
    path: str = ""
    text_field: str = "text"  # of a JSON line
    tokenizer: str = "bytes"
    sequence_length: int = 128
    batch_size: int = 32
    heldout_share: float = 0.05
    cache_dir: str = ".cache/laep_jax"

    def __post_init__(self):
        check_fields(self)
        one_of("DataConfig.source", self.source, ("stdlib", "text", "jsonl", "array_record", "synthetic"))
        reads_path = self.source in ("text", "jsonl", "array_record")
        require(bool(self.path) == reads_path, "DataConfig.path", self.path, f"does not go with source={self.source!r}")
        for name in ("path", "cache_dir"):
            require("://" not in getattr(self, name), f"DataConfig.{name}", getattr(self, name), "must be mounted")
        at_least(self, 2, "sequence_length")
        at_least(self, 1, "batch_size")
        require(0 < self.heldout_share < 1, "DataConfig.heldout_share", self.heldout_share, "must lie between 0 and 1")


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay to `final_fraction` of `learning_rate`.

    `schedule`: "cosine" decays from the warm-up on and is stretched where `num_steps` is raised; "wsd" stays at the
    peak and decays linearly over the last `decay_fraction` of the steps, so that a run can be extended until then.
    """

    learning_rate: float = 2e-3
    warmup_steps: int = 50
    final_fraction: float = 0.1
    schedule: str = "cosine"
    decay_fraction: float = 0.2  # of num_steps; of schedule="wsd" only
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    def __post_init__(self):
        check_fields(self)
        require(self.learning_rate > 0, "OptimizerConfig.learning_rate", self.learning_rate, "must be positive")
        require(self.clip_norm > 0, "OptimizerConfig.clip_norm", self.clip_norm, "must be positive")
        require(self.eps > 0, "OptimizerConfig.eps", self.eps, "must be positive")
        at_least(self, 0, "warmup_steps", "weight_decay")
        in_range(self, 0, 1, "final_fraction", "b1", "b2", "decay_fraction")
        one_of("OptimizerConfig.schedule", self.schedule, ("cosine", "wsd"))


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, rhythm and seed of a run. Counts are optimizer steps.

    A step whose loss or gradient is not finite is skipped; `max_skipped_steps` of them in a row stop the run.
    """

    num_steps: int = 400
    grad_accumulation: int = 1
    seed: int = 0
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int = 8
    checkpoint_every: int = 100
    keep_checkpoints: int = 3
    max_skipped_steps: int = 10
    step_timeout: float | None = 600.0  # seconds until a step counts as hung and the process ends; None: never

    def __post_init__(self):
        check_fields(self)
        at_least(self, 1, *(f.name for f in dataclasses.fields(self) if f.name != "seed"))
        in_range(self, 0, 2**31 - 1, "seed")
        in_range(self, 1, 7 * 24 * 3600, "step_timeout")


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
