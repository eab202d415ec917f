"""The configuration tree: YAML in, YAML out, and clear words for what is wrong."""

from __future__ import annotations

import dataclasses
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from retriever import DualEncoderConfig, InputError
from retriever.heads import HEADS, NoCompressionConfig, ProductQuantizerConfig
from training import Experiment, dump_experiment, load_experiment, parse_experiment
from training.experiment import (
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    OptimizationConfig,
    TrackingConfig,
)
from training.losses import LOSSES, ContrastiveConfig, MCLConfig

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "output": "run",
    "model": {"encoder": "a-model"},
    "head": {
        "class_path": "retriever.heads.ProductQuantizerConfig",
        "init_args": {"num_codebooks": 4, "restart_window": 7.0},
    },
    "loss": {"class_path": "training.losses.MCLConfig", "init_args": {"temperature": 0.5}},
    "data": {"source": "a-folder"},
}


def write(folder: Path, recipe: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(recipe if isinstance(recipe, str) else yaml.safe_dump(recipe), encoding="utf-8")
    return path


def changed(dotted: str, value: object) -> dict[str, Any]:
    """Return the recipe with one more or another field."""
    recipe: dict[str, Any] = yaml.safe_load(yaml.safe_dump(RECIPE))
    *parents, name = dotted.split(".")
    place = recipe
    for parent in parents:
        place = place.setdefault(parent, {})
    place[name] = value
    return recipe


def random_field(field: dataclasses.Field[Any], fresh: random.Random) -> Any:
    """Return a valid value other than the default of a plain field of a head or loss."""
    if field.type == "int":
        return fresh.randint(2, 8)
    return fresh.uniform(0.1, 2.0)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSSES)
def test_an_experiment_survives_dump_and_load(tmp_path: Path, head: str, loss: str) -> None:
    fresh = random.Random()
    head = "cnt" if loss == "inrp" else head  # the loss needs a head that maps
    values = [
        {f.name: random_field(f, fresh) for f in dataclasses.fields(config) if f.type in ("int", "float")}
        for config in (HEADS[head], LOSSES[loss])
    ]
    if "estimator" in {field.name for field in dataclasses.fields(HEADS[head])}:
        values[0] |= {"estimator": "softmax"}  # carries every loss
    else:
        values[1].pop("assignment_weight", None)
    if head == "cnt":  # fewer dimensions come out than go in
        values[0]["tokens"] += values[0]["expansion"]
    experiment = Experiment(
        output="räksmörgås: #1",
        model=DualEncoderConfig(encoder="no", tie=False, query_prompt="query: ", pooling="cls"),
        head=HEADS[head](**values[0]),
        loss=LOSSES[loss](**values[1]),
        data=DataConfig(source="123", evaluation_source="on", max_pairs=5),
        optimization=OptimizationConfig(
            steps=7, lr=fresh.uniform(1e-9, 1e-3), precision="bf16", dense_warmup=0.0
        ),
        evaluation=EvaluationConfig(metric="dense/mrr@10"),
        checkpoint=CheckpointConfig(keep=3),
        tracking=TrackingConfig(trackers=["tensorboard"], tags=["a: b", "yes"], name="on"),
        seed=fresh.getrandbits(31),
    )
    assert load_experiment(write(tmp_path, dump_experiment(experiment))) == experiment


@pytest.mark.parametrize("revision", ["12e4567", "1234567", "0x1f", "true", "1_000", "2020-01-01", "[1]"])
def test_a_text_that_looks_like_another_type_survives_dump_and_load(tmp_path: Path, revision: str) -> None:
    """Short commit hashes do look like numbers."""
    model = DualEncoderConfig(encoder="model", revision=revision)
    experiment = dataclasses.replace(load_experiment(write(tmp_path, RECIPE)), model=model)
    assert load_experiment(write(tmp_path, dump_experiment(experiment))) == experiment


def test_a_dump_holds_every_field_of_every_level(tmp_path: Path) -> None:
    dumped = yaml.safe_load(dump_experiment(load_experiment(write(tmp_path, RECIPE))))
    for name, config in [("optimization", OptimizationConfig), ("data", DataConfig), (None, Experiment)]:
        assert set(dumped[name] if name else dumped) == {field.name for field in dataclasses.fields(config)}


def test_fields_left_out_of_the_yaml_have_the_defaults(tmp_path: Path) -> None:
    assert load_experiment(write(tmp_path, RECIPE)).optimization == OptimizationConfig()


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_recipe_in_configs_loads(recipe: Path) -> None:
    assert isinstance(load_experiment(recipe), Experiment)


def test_every_recipe_in_the_documentation_loads(tmp_path: Path) -> None:
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for block in re.findall(r"^```ya?ml\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if re.search(r"^output:", block, re.M):  # a whole experiment
                assert isinstance(load_experiment(write(tmp_path, block)), Experiment), page


@pytest.mark.parametrize(
    "place",
    [
        "wrong_name",
        "model.wrong_name",
        "head.init_args.wrong_name",
        "loss.init_args.wrong_name",
        "data.wrong_name",
        "optimization.wrong_name",
        "evaluation.wrong_name",
        "checkpoint.wrong_name",
        "tracking.wrong_name",
    ],
)
def test_an_unknown_field_is_named_on_one_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(InputError, match=r"\A[^\n]*wrong_name[^\n]*\Z"):
        load_experiment(write(tmp_path, changed(place, 1)))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("seed", "zero"),
        ("optimization.steps", "many"),
        ("optimization.batch_size", 2.5),
        ("optimization.lr", "fast"),
        ("optimization.schedule", "linea"),
        ("optimization.precision", "fp8"),
        ("model.pooling", "max"),
        ("model.tie", "perhaps"),
        ("tracking.trackers", "wandb"),
        ("head.init_args.codebook_bits", "eight"),
        ("loss.init_args.temperature", "cold"),
    ],
)
def test_a_value_of_a_wrong_type_is_an_error_that_names_field_and_value(
    tmp_path: Path, place: str, value: object
) -> None:
    with pytest.raises(InputError) as caught:
        load_experiment(write(tmp_path, changed(place, value)))
    assert place.split(".")[-1] in str(caught.value)
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("data.negatives_per_query", -1),
        ("data.max_pairs", 0),
        ("optimization.batch_size", 0),
        ("optimization.accumulation", 0),
        ("optimization.bucket_batches", 0),
        ("optimization.warm_start_documents", 0),
        ("optimization.steps", 0),
        ("optimization.lr", 0.0),
        ("optimization.head_lr", -1.0),
        ("optimization.epochs", 0.0),
        ("optimization.max_grad_norm", float("inf")),
        ("optimization.warmup", 1.5),
        ("optimization.dense_warmup", -0.1),
        ("optimization.weight_decay", -0.1),
        ("evaluation.every", -1),
        ("evaluation.patience", -1),
        ("evaluation.metric", "compressed/ndcg@11"),
        ("checkpoint.every", -1),
        ("checkpoint.keep", 0),
        ("tracking.every", 0),
        ("head.init_args.num_codebooks", 0),
        ("loss.init_args.temperature", -0.05),
    ],
)
def test_a_value_out_of_range_is_an_error_that_names_field_and_value(
    tmp_path: Path, place: str, value: object
) -> None:
    with pytest.raises(InputError, match=rf"{place.split('.')[-1]} must be .*got '?{re.escape(str(value))}"):
        load_experiment(write(tmp_path, changed(place, value)))


def test_nan_is_no_learning_rate() -> None:
    with pytest.raises(InputError, match=r"optimization\.lr must be positive, got nan"):
        OptimizationConfig(lr=float("nan"))


def test_a_batch_that_accumulation_does_not_divide_is_refused_with_both_numbers() -> None:
    with pytest.raises(InputError, match=r"batch_size must be a multiple of accumulation, got 10 and 4"):
        OptimizationConfig(batch_size=10, accumulation=4)


def test_a_recipe_without_a_model_names_the_missing_field(tmp_path: Path) -> None:
    recipe = {name: value for name, value in RECIPE.items() if name != "model"}
    with pytest.raises(InputError, match=r"model\.encoder"):
        load_experiment(write(tmp_path, recipe))


@pytest.mark.parametrize("text", ["", "- 1\n", "output: [\n", "text"], ids=["empty", "list", "cut", "scalar"])
def test_a_file_that_is_no_yaml_mapping_is_an_error_of_one_line(tmp_path: Path, text: str) -> None:
    with pytest.raises(InputError, match=r"\A[^\n]+\Z"):
        load_experiment(write(tmp_path, text))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.yaml is not a file"):
        load_experiment(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("kind", ["head", "loss"])
def test_a_short_class_name_means_the_same_as_the_whole_path(tmp_path: Path, kind: str) -> None:
    whole = load_experiment(write(tmp_path, RECIPE))
    short = RECIPE[kind]["class_path"].rpartition(".")[2]
    assert load_experiment(write(tmp_path, changed(f"{kind}.class_path", short))) == whole


def test_the_command_line_overrides_one_field_and_keeps_the_others(tmp_path: Path) -> None:
    path = write(tmp_path, RECIPE)
    parsed = parse_experiment(["--config", str(path), "--optimization.lr", "0.25", "--seed", "9"])
    expected = dataclasses.replace(load_experiment(path), optimization=OptimizationConfig(lr=0.25), seed=9)
    assert parsed == expected


def test_the_command_line_overrides_a_field_of_the_head(tmp_path: Path) -> None:
    parsed = parse_experiment(["--config", str(write(tmp_path, RECIPE)), "--head.num_codebooks", "8"])
    assert parsed.head == ProductQuantizerConfig(num_codebooks=8, restart_window=7.0)


def test_switching_to_no_compression_leaks_no_value_of_the_quantizer(tmp_path: Path) -> None:
    parsed = parse_experiment(["--config", str(write(tmp_path, RECIPE)), "--head", "NoCompressionConfig"])
    assert parsed.head == NoCompressionConfig()


def test_switching_to_the_quantizer_gives_its_defaults(tmp_path: Path) -> None:
    recipe = changed("head", {"class_path": "NoCompressionConfig"})
    parsed = parse_experiment(["--config", str(write(tmp_path, recipe)), "--head", "ProductQuantizerConfig"])
    assert parsed.head == ProductQuantizerConfig()


def test_switching_the_loss_leaks_no_field_that_the_other_does_not_have(tmp_path: Path) -> None:
    recipe = changed("loss.init_args", {"dense_weight": 3.0})
    parsed = parse_experiment(["--config", str(write(tmp_path, recipe)), "--loss", "ContrastiveConfig"])
    assert parsed.loss == ContrastiveConfig()


@pytest.mark.parametrize("config", [*HEADS.values(), *LOSSES.values(), OptimizationConfig])
def test_configurations_cannot_be_changed(config: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().anything = 1


def test_a_loss_that_does_not_fit_the_head_is_refused_when_the_file_is_read(tmp_path: Path) -> None:
    assert MCLConfig(assignment_weight=1.0).assignment_weight == 1.0  # the loss alone is fine
    with pytest.raises(InputError, match=r"assignment_weight=1\.0 needs a head with selection"):
        load_experiment(write(tmp_path, changed("loss.init_args.assignment_weight", 1.0)))
