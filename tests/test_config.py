import json
import re
import typing

import pytest

from laep_jax.config import AuxLossConfig, Config, DataConfig, LaepConfig, MeshConfig, ModelConfig, OptimizerConfig
from laep_jax.errors import UserError
from laep_jax.fields import settings_of


def test_dictionary_form_round_trips_through_json():
    config = Config(model=ModelConfig(num_experts=(16, 8, 12, 16)), laep=LaepConfig(alpha=(0.1, 0.2, 0.3, 0.4)))
    assert Config.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    mixed = Config(data=DataConfig("jsonl", mixture=[["web", "a/*.jsonl", 0.7], ("code", "gs://b/code", 3)]))
    assert mixed.data.mixture == (("web", "a/*.jsonl", 0.7), ("code", "gs://b/code", 3))
    assert Config.from_dict(json.loads(json.dumps(mixed.to_dict()))) == mixed
    assert [(name, part.path, part.mixture, part.source) for name, part in mixed.data.parts] == [
        ("web", "a/*.jsonl", None, "jsonl"),
        ("code", "gs://b/code", None, "jsonl"),
    ]


def test_every_field_states_its_meaning():
    """A new field is made by `fixed` or `free`, which decides whether a run may change it."""
    for part in typing.get_type_hints(Config).values():
        for name, setting in settings_of(part).items():
            assert len(setting.meaning.split()) > 1, name


def mixture(*sources, source="jsonl", **fields) -> DataConfig:
    return DataConfig(source, mixture=sources, **fields)


def test_one_number_of_experts_serves_every_layer():
    assert ModelConfig(num_layers=3, num_experts=8).num_experts == (8, 8, 8)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LaepConfig(alpha="abc"), "LaepConfig.alpha='abc' must be one of inf, hybrid"),
        (lambda: LaepConfig(alpha=-0.1), "LaepConfig.alpha=-0.1 must be at least 0"),
        (lambda: LaepConfig(beta=1.5), "LaepConfig.beta=1.5 must lie between 0 and 1"),
        (lambda: LaepConfig(beta=float("nan")), "LaepConfig.beta=nan must be a finite number"),
        (lambda: ModelConfig(num_experts="eight"), "ModelConfig.num_experts='eight' must be of type"),
        (lambda: ModelConfig(rope_base=1), "ModelConfig.rope_base=1 must be above 1"),
        (lambda: DataConfig(validation_fraction=1), "DataConfig.validation_fraction=1 must be above 0 and below 1"),
        (lambda: ModelConfig(num_layers=True), "ModelConfig.num_layers=True must be of type int"),
        (lambda: ModelConfig(num_layers=2, num_experts=(8,)), "needs one entry for each of num_layers=2"),
        (lambda: ModelConfig(num_experts=4, top_k=8), "ModelConfig.num_experts[0]=4 is below top_k=8"),
        (lambda: DataConfig(source="text"), "DataConfig.path='' is needed: source='text' reads files"),
        (lambda: DataConfig(path="x"), "DataConfig.path='x' is unused by source='stdlib'"),
        (lambda: DataConfig(cache_dir="gs://b/c"), "DataConfig.cache_dir='gs://b/c' must be mounted"),
        (lambda: DataConfig("text", "s3://a/b"), "DataConfig.path='s3://a/b' must be a path or gs://BUCKET/FOLDER"),
        (lambda: DataConfig("text", "~/a"), "DataConfig.path='~/a' must not begin with ~"),
        (lambda: DataConfig(tokenizer="$HOME/a"), "DataConfig.tokenizer='$HOME/a' must not hold variables"),
        (lambda: DataConfig(cache_dir="a\n"), "DataConfig.cache_dir='a\\n' must not begin or end with white space"),
        (lambda: DataConfig(cache_dir=""), "DataConfig.cache_dir='' must not be empty"),
        (lambda: DataConfig("text", "a\udcff"), "DataConfig.path='a\\udcff' must be valid UTF-8"),
        (lambda: mixture(("a", "x", 1.0), ("a", "y", 1.0)), "DataConfig.mixture=['a', 'a'] has a name twice: a"),
        (lambda: mixture(("a", "x", 0.0)), "DataConfig.mixture=0.0 must be positive"),
        (lambda: mixture(("a", "x", -1)), "DataConfig.mixture=-1 must be positive"),
        (lambda: mixture(("a", "x", float("inf"))), "DataConfig.mixture=inf must be a finite number"),
        (lambda: mixture(("a", "x", 1), ("b", "y", 1e-9)), "weights of DataConfig.mixture=[1, 1e-09] must not differ"),
        (lambda: mixture(), "DataConfig.mixture=() must not be empty; None is a single corpus"),
        (lambda: mixture(("a", "x")), "DataConfig.mixture=(('a', 'x'),) must be of type tuple[tuple[str, str, float]"),
        (lambda: mixture(("a", "x", 1.0), path="z"), "DataConfig.path='z' is unused with DataConfig.mixture"),
        (lambda: mixture(("a", "s3://x", 1.0)), "DataConfig.mixture='s3://x' must be a path or gs://BUCKET/FOLDER"),
        (lambda: mixture(("a", "", 1.0)), "DataConfig.mixture='' must not be empty"),
        (lambda: mixture(("a", "x", 1.0), source="stdlib"), "is unused by source='stdlib', which reads no files"),
        (
            lambda: mixture(("a", "x", 1.0), domain_field="d"),
            "DataConfig.domain_field='d' is unused with DataConfig.mix",
        ),
        (lambda: DataConfig("text", "x", domain_field="d"), "DataConfig.domain_field='d' is unused by source='text'"),
        (lambda: OptimizerConfig(learning_rate=0.0), "OptimizerConfig.learning_rate=0.0 must be positive"),
        (lambda: AuxLossConfig(mixtral=-1.0), "AuxLossConfig.mixtral=-1.0 must be at least 0"),
        (lambda: Config(laep=LaepConfig(alpha=(0.1,))), "needs one entry for each of num_layers=4"),
        (lambda: Config.from_dict({"modle": {}}), "config has unknown parts: modle"),
    ],
)
def test_a_bad_value_is_named_with_its_rule(make, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("mesh", "devices", "experts", "sizes"),
    [
        (MeshConfig(), 8, (16, 16), (1, 1, 8)),
        (MeshConfig(), 8, (12, 16), (1, 1, 8)),
        (MeshConfig(), 8, (7, 16), (1, 2, 4)),
        (MeshConfig(), 12, (7, 16), (1, 2, 6)),
        (MeshConfig(data=2), 8, (16,), (2, 1, 4)),
        (MeshConfig(fsdp=4), 8, (16,), (1, 4, 2)),
        (MeshConfig(expert=2), 8, (16,), (1, 4, 2)),
        (MeshConfig(), 1, (3,), (1, 1, 1)),
    ],
)
def test_open_mesh_sizes_come_from_the_devices(mesh, devices, experts, sizes):
    resolved = mesh.resolve(devices, experts)
    assert (resolved.data, resolved.fsdp, resolved.expert) == sizes


@pytest.mark.parametrize(
    ("mesh", "devices", "message"),
    [
        (MeshConfig(expert=3), 8, "does not divide 8 devices"),
        (MeshConfig(fsdp=2, expert=2), 8, "makes 4 places, but there are 8 devices"),
        (MeshConfig(expert=16), 16, "ModelConfig.num_experts[1]=12 is below MeshConfig.expert=16"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(mesh, devices, message):
    with pytest.raises(UserError, match=re.escape(message)):
        mesh.resolve(devices, (16, 12))


def test_a_batch_that_does_not_divide_is_refused():
    with pytest.raises(UserError, match=re.escape("DataConfig.batch_size=12 is not divisible by 8 devices")):
        Config(data=DataConfig(batch_size=12)).resolve(8)
