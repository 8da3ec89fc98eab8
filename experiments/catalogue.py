"""The experiments: which rows each has, in which order, and what the paper reports for them.

The paper's parameters are in billions, its losses those of its own validation text; only what changes against its base
model can be compared with ours.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row in an experiment. parameters, loss: the paper's, None where it has none. base: what it is compared with."""

    row: str
    label: str
    parameters: float | None = None
    loss: float | None = None
    base: str = "base"


@dataclasses.dataclass(frozen=True)
class Experiment:
    title: str
    entries: tuple[Entry, ...]

    def base(self, entry: Entry) -> Entry:
        """The entry that this one is compared with."""
        return next(other for other in self.entries if other.row == entry.base)


COEFFICIENTS = ("0.1", "0.01", "0.001", "0.0001")
DEEPSEEK, MIXTRAL = (1.707, 1.682, 1.664, 1.656), (1.706, 1.684, 1.663, 1.656)
BASE = Entry("base", "base", 9.78, 1.661)
TABLE1 = (
    BASE,
    *(Entry(f"deepseek_{c}", f"DeepSeek-V3 loss {c}", 9.78, x) for c, x in zip(COEFFICIENTS, DEEPSEEK, strict=True)),
    *(Entry(f"mixtral_{c}", f"Mixtral loss {c}", 9.78, x) for c, x in zip(COEFFICIENTS, MIXTRAL, strict=True)),
    Entry("beta_0.05", "α = inf, β = 0.05", 8.06, 1.648),
    Entry("beta_0.1", "α = inf, β = 0.1", 6.89, 1.658),
    Entry("beta_0.2", "α = inf, β = 0.2", 5.10, 1.679),
    Entry("beta_0.4", "α = inf, β = 0.4", 2.76, 1.725),
    Entry("alpha_0.2", "α = 0.2, β = 0.1", 8.72, 1.643),
    Entry("alpha_hybrid", "α hybrid, β = 0.1", 7.89, 1.650),
    Entry("alpha_0.4", "α = 0.4, β = 0.1", 7.38, 1.653),
    Entry("alpha_0.6", "α = 0.6, β = 0.1", 6.51, 1.661),
)
WITHOUT_LFA = (
    Entry("no_lfa", "base without LFA", None, 1.739, "no_lfa"),
    Entry("no_lfa_alpha_0.2", "α = 0.2, without LFA", None, 1.723, "no_lfa"),
    Entry("no_lfa_alpha_hybrid", "α hybrid, without LFA", None, 1.729, "no_lfa"),
    Entry("no_lfa_alpha_0.4", "α = 0.4, without LFA", None, 1.733, "no_lfa"),
    Entry("no_lfa_alpha_0.6", "α = 0.6, without LFA", None, 1.741, "no_lfa"),
)
TABLE3 = (
    Entry("tasks", "base", 19.909, 1.565, "tasks"),
    Entry("tasks_deepseek_0.0001", "DeepSeek-V3 loss 0.0001", 19.909, 1.563, "tasks"),
    Entry("tasks_alpha_0.2", "α = 0.2", 19.186, 1.551, "tasks"),
    Entry("tasks_alpha_hybrid", "α hybrid", 17.776, 1.556, "tasks"),
    Entry("tasks_alpha_0.4", "α = 0.4", 16.448, 1.559, "tasks"),
    Entry("tasks_alpha_0.6", "α = 0.6", 14.624, 1.567, "tasks"),
)
SCORED = {entry.row for entry in TABLE3}  # of which the model at the end is scored by lm_eval
TABLE4 = (
    Entry("base", "64 experts", 19.91, 1.565),
    Entry("alpha_hybrid", "64, LAEP", 17.50, 1.556),
    Entry("experts_128", "128 experts", 38.96, 1.526, "experts_128"),
    Entry("experts_128_hybrid", "128, LAEP", 32.59, 1.518, "experts_128"),
    Entry("experts_256", "256 experts", 77.61, 1.498, "experts_256"),
    Entry("experts_256_hybrid", "256, LAEP", 57.23, 1.492, "experts_256"),
)
TABLE5 = (
    Entry("base", "base", 1515),
    Entry("mixtral_0.01", "Mixtral loss 0.01", 1515),
    Entry("deepseek_0.01", "DeepSeek-V3 loss 0.01", 1515),
    Entry("alpha_hybrid", "LAEP", 1010),
    Entry("uniform_48_deepseek_0.01", "48 experts, DeepSeek-V3 loss 0.01", 1142),
)
BASELINES = (
    Entry("base", "base"),
    Entry("other_order", "base, added up in another order"),
    Entry("alpha_hybrid", "LAEP (α hybrid, β = 0.1)"),
    Entry("random", "as many of each layer, at random"),
    Entry("frequency", "as many, the least used, equally many in each layer"),
    Entry("from_start", "a model of that size from the first step on"),
)
OPEN = (
    Entry("base", "base"),
    Entry("alpha_hybrid", "LAEP at step 260"),
    Entry("early", "early: at step 60"),
    Entry("late", "late: at step 410"),
    Entry("rounds", "at step 110, and twice more if it can"),
    Entry("moments_reset", "Adam's moments begin anew"),
)
DOMAINS = (
    Entry("domains", "base, code and prose", None, None, "domains"),
    Entry("domains_pruned", "α = inf, β = 0.3", None, None, "domains"),
    Entry("domains_spared", "the same with domain_beta = 0.3", None, None, "domains"),
)
PHASES = (
    Entry("base", "64 experts, BPE"),
    Entry("experts_16", "16 experts, BPE"),
    Entry("bytes", "64 experts, bytes"),
    Entry("bytes_experts_16", "16 experts, bytes"),
)
EXPERIMENTS = {
    "phases": Experiment("Two phases (Figure 1, section 3.1)", PHASES),
    "table1": Experiment("Pruning coefficients and balancing losses (Table 1, Figure 4)", TABLE1),
    "table2": Experiment("With and without LFA (Table 2)", (BASE, *TABLE1[-4:], *WITHOUT_LFA)),
    "table3": Experiment("Scores in tasks (Table 3)", TABLE3),
    "table4": Experiment("64, 128 and 256 experts (Table 4)", TABLE4),
    "table5": Experiment("Balancing by losses or by LAEP (Table 5)", TABLE5),
    "baselines": Experiment("What any prune of that size would do", BASELINES),
    "domains": Experiment("A rare domain beside a frequent one", DOMAINS),
    "open": Experiment("When, how often, and what becomes of the moments", OPEN),
}
