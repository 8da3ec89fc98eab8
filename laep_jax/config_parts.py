"""The settings of pruning, data, optimizer and training, each with its default, its meaning and its values.

Import them from `laep_jax.config`, which adds the model and the mesh.
"""

import dataclasses
import math

from laep_jax.errors import require
from laep_jax.fields import check_fields, fixed, free

PLACEMENTS = ("greedy", "refined")
SOURCES_WITH_PATH = ("text", "jsonl", "parquet", "datasets", "array_record")
SOURCES_WITH_FIELDS = ("jsonl", "parquet", "datasets")
MAX_RATIO = 1e6  # of two weights of a mixture


@dataclasses.dataclass(frozen=True)
class AuxLossConfig:
    """Coefficients of the balancing terms; 0 leaves a term out."""

    mixtral: float = free(0.0, "balancing loss of Switch and Mixtral, 1 at equal loads", low=0)
    mixtral_hf: float = free(0.0, "the same without the division by top_k, top_k at equal loads", low=0)
    deepseek_v3: float = free(0.0, "DeepSeek-V3's balancing loss of each sequence", low=0)
    router_z: float = free(0.0, "squared log-sum-exp of the router's logits", low=0)
    loss_free_bias: float = free(0.0, "no loss, but the step by which DeepSeek's selection bias moves", low=0)

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class LaepConfig:
    """When to prune, what, and where the remaining experts are placed (paper sections 3.2 and 3.3)."""

    alpha: float | str | tuple[float | str, ...] = free(
        "hybrid",
        "individual bound: an expert with at most this many times the layer's mean load may go; hybrid: 0.2 in the"
        " first and last sixth of the layers, 0.4 between; or one a layer; inf: no bound",
        low=0,
        choices=("inf", "hybrid"),
    )
    beta: float = free(
        0.1,
        "cumulative bound: the lightest experts may go that together have this fraction of a layer's tokens",
        low=0,
        high=1,
    )
    domain_beta: float | None = free(
        None,
        "the same bound in every domain: the pruned experts have at most this fraction of each domain's tokens",
        low=0,
        high=1,
    )
    target_experts: float | None = free(
        None,
        "experts to keep, of all layers: below 1 a fraction of them, else a number; beta becomes what it takes",
        above=0,
    )
    min_experts: int | None = free(None, "experts that every layer keeps at least", low=1)
    max_experts: int | None = free(
        None, "experts that every layer keeps at most, whatever alpha and beta say: programs pad to the widest", low=1
    )
    estimator: str = free(
        "vote",
        "how a window decides: by votes of its iterations (vote), or by its mean loads (mean)",
        choices=("vote", "mean"),
    )
    inequality: str = free("le", "whether an expert at a bound is pruned (le) or kept (lt)", choices=("le", "lt"))
    rounding: str = free(
        "keep_more",
        "where the survivors do not divide by the devices: keep more, prune more, or leave them",
        choices=("keep_more", "prune", "none"),
    )
    placement: str = free(
        "refined", "of the survivors: the paper's greedy algorithm, or that and the best swaps", choices=PLACEMENTS
    )
    placement_loads: str = free(
        "masked",
        "place by the loads of the pruned model, measured with the pruned experts masked, or by the recorded ones",
        choices=("masked", "recorded"),
    )
    window: int = free(25, "steps of a window of loads", low=1)
    max_moved: float = free(
        0.1,
        "stable: at most this fraction of any layer's tokens changed expert since the window before",
        above=0,
        high=1,
    )
    max_regret: float = free(
        0.05,
        "stable: the experts chosen a window ago have at most this fraction of the tokens more than those chosen now",
        above=0,
        high=1,
    )
    max_excess: float = free(
        3.0, "stable: the load of an expert chosen a window ago is at most so many times its bound alpha", low=1
    )
    stable_windows: int = free(2, "windows in a row that must pass the test before the loads count as stable", low=1)
    min_step: int = free(100, "the first step after which loads may count as stable", low=0)
    prune_at_step: int | None = free(None, "plan after this step, stable loads or not; None: once they are", low=1)
    plan: str = free("", "a plan.json to apply at prune_at_step, instead of one made from the loads", path=True)
    max_prunes: int = free(1, "how often to prune; 0: never", low=0)
    replica_slots: int = free(
        1,
        "slots of each device for replicas of hot experts, beside those for its part of the experts; 0: the paper",
        low=0,
    )
    rebalance_every: int | None = free(
        25,
        "steps after which experts and replicas are placed anew, by the last window of loads; None: at a prune only",
        low=1,
    )
    prune_delay: int = free(20, "steps between a plan and its prune, while the smaller model's step compiles", low=0)
    prune_via: str = free(
        "checkpoint",
        "read the survivors from the checkpoint, or gather them in device memory",
        choices=("checkpoint", "memory"),
    )
    reset_moments: bool = free(
        False, "zero the optimizer's moments at a prune, instead of moving them with the experts"
    )
    guard_tolerance: float | None = free(
        0.2,
        "nats by which the validation loss may rise without the experts to prune; a plan that costs more is refused;"
        " None: any",
        low=0,
    )
    max_retries: int = free(2, "plans made after a refused one, each with alpha and beta halved", low=0)

    def __post_init__(self):
        by_layer = isinstance(self.alpha, (list, tuple))
        alphas = tuple(self.alpha) if isinstance(self.alpha, (list, tuple)) else (self.alpha,)
        alphas = tuple("inf" if alpha == math.inf else alpha for alpha in alphas)  # JSON has no infinity
        object.__setattr__(self, "alpha", alphas if by_layer else alphas[0])
        check_fields(self)
        for alpha in alphas:
            require(alpha != "hybrid" or not by_layer, "LaepConfig.alpha", alpha, "must be one of inf, or numbers")
        require(not self.plan or self.prune_at_step is not None, "LaepConfig.plan", self.plan, "needs prune_at_step")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where text comes from and how it is cut into batches."""

    source: str = fixed(
        "stdlib",
        "the running Python's own sources, files of text, JSON lines, Parquet, folders of Hugging Face datasets,"
        " ArrayRecord, or made-up text",
        choices=("stdlib", *SOURCES_WITH_PATH, "synthetic"),
    )
    path: str = free(
        "",
        "a file, folder or glob of such files, also gs://; compared by hash",
        path=True,
        bucket=True,
    )
    text_field: str = fixed("text", "the field of a JSON line, or the column of a row, that holds the text")
    domain_field: str = free(
        "", "the field or column that names the domain; empty: the first folder below the path, or the file"
    )
    mixture: tuple[tuple[str, str, float], ...] | None = free(
        None,
        "several corpora instead of `path`: (name, path, weight) of each; weights are fractions of the training tokens,"
        " whatever their sum; names, weights and what lies at the paths are compared by hash",
        path=True,
        bucket=True,
        above=0,
    )
    tokenizer: str = free("bytes", "bytes, or the path of a Hugging Face tokenizer.json; compared by hash", path=True)
    sequence_length: int = fixed(128, "tokens of a sequence", low=2)
    batch_size: int = fixed(32, "sequences of an optimizer step, over all devices and processes", low=1)
    validation_fraction: float = fixed(0.05, "fraction of the documents kept for validation", above=0, below=1)
    cache_dir: str = free(".cache/laep_jax", "the folder where token files are kept", path=True)

    def __post_init__(self):
        check_fields(self)
        unused = f"is unused by source={self.source!r}"
        has_fields = self.source in SOURCES_WITH_FIELDS
        require(has_fields or not self.domain_field, "DataConfig.domain_field", self.domain_field, unused)
        if self.mixture is not None:
            self._check_mixture(self.mixture)
        else:
            needs_path = self.source in SOURCES_WITH_PATH
            rule = f"is needed: source={self.source!r} reads files" if needs_path else unused
            require(bool(self.path) == needs_path, "DataConfig.path", self.path, rule)

    def _check_mixture(self, mixture: tuple[tuple[str, str, float], ...]) -> None:
        names, weights = [name for name, _, _ in mixture], [weight for _, _, weight in mixture]
        rule = f"is unused by source={self.source!r}, which reads no files"
        require(self.source in SOURCES_WITH_PATH, "DataConfig.mixture", mixture, rule)
        require(bool(mixture), "DataConfig.mixture", mixture, "must not be empty; None is a single corpus")
        twice = sorted({name for name in names if names.count(name) > 1})
        require(not twice, "DataConfig.mixture", names, f"has a name twice: {', '.join(twice)}")
        rule = f"must not differ by more than {MAX_RATIO:,.0f} times"
        require(max(weights) <= MAX_RATIO * min(weights), "weights of DataConfig.mixture", weights, rule)
        require(not self.path, "DataConfig.path", self.path, "is unused with DataConfig.mixture")
        rule = "is unused with DataConfig.mixture, whose names are the domains"
        require(not self.domain_field, "DataConfig.domain_field", self.domain_field, rule)

    @property
    def parts(self) -> tuple[tuple[str, "DataConfig"], ...]:
        """(name, its own config) of every corpus; a single one has the name ""."""
        if self.mixture is None:
            return (("", self),)
        return tuple((name, dataclasses.replace(self, mixture=None, path=path)) for name, path, _ in self.mixture)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and decay to `final_fraction` of `learning_rate`."""

    learning_rate: float = free(2e-3, "the peak, after warm-up", above=0)
    warmup_steps: int = free(50, "steps of the linear warm-up", low=0)
    final_fraction: float = free(0.1, "the rate at the last step, as a fraction of the peak", low=0, high=1)
    schedule: str = free(
        "cosine",
        "the decay after warm-up: cosine, which a larger num_steps stretches, or wsd, constant and then linear,"
        " which can be extended until it decays",
        choices=("cosine", "wsd"),
    )
    decay_fraction: float = free(0.2, "fraction of num_steps over which wsd decays", low=0, high=1)
    b1: float = fixed(0.9, "decay of the first moment", low=0, below=1)
    b2: float = fixed(0.95, "decay of the second moment", low=0, below=1)
    eps: float = free(1e-8, "epsilon of Adam's denominator", above=0)
    weight_decay: float = free(0.1, "decoupled weight decay", low=0)
    clip_norm: float = free(1.0, "largest global norm of the gradient", above=0)

    def __post_init__(self):
        check_fields(self)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Length, rhythm and seed of a run. Counts are optimizer steps unless said otherwise."""

    num_steps: int = free(400, "length of the run", low=1)
    grad_accumulation: int = fixed(1, "micro-batches of a step; balancing losses are means over one", low=1)
    seed: int = fixed(0, "of parameters and the order of the data", low=0, high=2**31 - 1)
    log_every: int = free(10, "steps between lines of the log", low=1)
    eval_every: int = free(100, "steps between validations", low=1)
    eval_batches: int = free(8, "batches of a validation", low=1)
    sample_every: int | None = free(
        None,
        "steps between samples in the log, text that the model writes; None: never",
        low=1,
    )
    checkpoint_every: int = free(100, "steps between checkpoints; a kill loses at most as many", low=1)
    keep_checkpoints: int = free(3, "newest checkpoints that are kept", low=1)
    max_skipped_steps: int = free(
        10, "a step whose loss or gradient is not finite is skipped; as many in a row stop the run", low=1
    )
    step_timeout: float | None = free(
        600.0, "seconds until a step counts as hung and the process ends; None: never", low=1, high=7 * 24 * 3600
    )
    trackers: tuple[str, ...] | str = free(
        (),
        "services that get the numbers of TensorBoard too: one, or several as ('wandb', 'trackio'); each is an extra",
        choices=("wandb", "trackio"),
    )

    def __post_init__(self):
        check_fields(self)
        require(
            len(set(self.tracker_names)) == len(self.tracker_names),
            "TrainConfig.trackers",
            self.trackers,
            "has one twice",
        )

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """`trackers`, always as a tuple."""
        return (self.trackers,) if isinstance(self.trackers, str) else self.trackers
