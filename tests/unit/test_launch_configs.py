"""accelerate's configuration files say to Endex what they say to `accelerate launch`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.launch import prepare_multi_gpu_env
from torch.distributed.run import get_args_parser

from launch.distributed import (
    CONFIGS,
    accelerate_environment,
    start_processes,
    take_options,
    torchrun_words,
)
from launch.train import run
from retriever import InputError
from training.sharding import sharding_wanted

NAMES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
HOST = ["--main_process_ip", "node1"]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("ACCELERATE_", "FSDP_")) or name in ("RANK", "WORLD_SIZE"):
            monkeypatch.delenv(name)


def options(*words: str) -> Any:
    rest, config = take_options(["recipe.yaml", "--accelerate_config", *words, "--seed", "1"])
    assert rest == ["recipe.yaml", "--seed", "1"]
    return config


def parse_torchrun(words: list[str]) -> Any:
    return get_args_parser().parse_args([*words, "--no-python", "endex"])


def test_the_names_are_those_of_the_documentation() -> None:
    assert NAMES == ["cpu_gloo", "fsdp2", "multi_gpu", "multi_node", "single_gpu"]


@pytest.mark.parametrize("name", NAMES)
def test_accelerate_reads_a_configuration(name: str) -> None:
    found, ours = load_config_from_file(str(CONFIGS / f"{name}.yaml")), options(name, *HOST)
    assert (found.num_processes, found.num_machines) == (ours.num_processes, ours.num_machines)
    assert found.distributed_type == ours.distributed_type
    assert found.fsdp_config == ours.fsdp_config


def test_fsdps_variables_are_those_of_accelerate_launch() -> None:
    words = ["--config_file", str(CONFIGS / "fsdp2.yaml"), "--main_process_port", "0", "--no_python", "endex"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(words))
    theirs = prepare_multi_gpu_env(arguments)
    ours = accelerate_environment(options("fsdp2"))
    assert ours["ACCELERATE_USE_FSDP"] == "true"
    assert {name: theirs[name] for name in ours} == ours


def test_accelerates_plugin_reads_fsdps_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in accelerate_environment(options("fsdp2")).items():
        monkeypatch.setenv(name, value)
    plugin = FullyShardedDataParallelPlugin()
    assert (plugin.fsdp_version, plugin.reshard_after_forward) == (2, True)
    assert sharding_wanted("bf16")


@pytest.mark.parametrize("name", ["single_gpu", "multi_gpu", "multi_node"])
def test_copies_of_a_model_need_no_variables(name: str) -> None:
    assert accelerate_environment(options(name, *HOST)) == {}
    assert not sharding_wanted("fp32")


def test_processes_of_one_machine_find_a_port_by_themselves() -> None:
    found = parse_torchrun(torchrun_words(options("multi_gpu", "--num_processes", "4")))
    assert (found.standalone, found.nproc_per_node, found.no_python) == (True, "4", True)


def test_machines_share_the_processes() -> None:
    words = ["--num_processes=8", "--num_machines", "2", "--machine_rank", "1", "--main_process_port", "7"]
    found = parse_torchrun(torchrun_words(options("multi_node", *HOST, *words)))
    assert (found.nnodes, found.nproc_per_node, found.node_rank) == ("2", "4", 1)
    assert (found.master_addr, found.master_port) == ("node1", 7)


def test_without_a_configuration_all_words_are_the_experiments() -> None:
    words = ["recipe.yaml", "--seed", "1", "--resume"]
    assert take_options(words) == (words, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--accelerate_config", "fsdp3"], r"fsdp3 is neither a file nor one of cpu_gloo, fsdp2, multi_gpu"),
        (["--num_processes", "2"], r"--num_processes needs --accelerate_config NAME"),
        (["--accelerate_config", "multi_gpu", "--num_processes", "two"], r"must be a number, got 'two'"),
        (["--accelerate_config", "multi_node"], r"4 machines.* Add --main_process_ip HOST"),
        (["--accelerate_config", "multi_node", *HOST, "--num_processes", "6"], r"multiple of num_machines 4"),
    ],
)
def test_a_faulty_option_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        take_options(words)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"distributed_type": "DEEPSPEED"}, r"distributed_type 'DEEPSPEED'.*FSDP shards what"),
        ({"deepspeed_config": {"zero_stage": 3}}, r"has a deepspeed_config, which Endex does not use"),
        ({"mixed_precision": "fp16"}, r"has mixed_precision fp16.*optimization\.precision decides"),
        ([], r"is no accelerate configuration"),
    ],
)
def test_a_file_that_asks_for_something_else_is_refused(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(InputError, match=message):
        take_options(["--accelerate_config", str(path)])


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """What this process would have become."""
    found: list[list[str]] = []

    def note(_: str, words: list[str]) -> None:
        found.append(words)
        raise SystemExit(0)

    monkeypatch.setattr(os, "execv", note)
    monkeypatch.setattr(os, "environ", {**os.environ})
    return found


def test_training_becomes_torchrun_of_the_same_words(executed: list[list[str]]) -> None:
    words = ["recipe.yaml", "--accelerate_config", "cpu_gloo", "--resume"]
    with pytest.raises(SystemExit):
        run(words)
    (found,) = executed
    assert found[:3] == [sys.executable, "-m", "torch.distributed.run"]
    after = found.index("--no-python")
    assert Path(found[after + 1]).name == "endex"
    assert found[after + 2 :] == ["train", *words]
    assert os.environ["ACCELERATE_USE_CPU"] == "true"


def test_under_a_launcher_no_process_is_started(executed: list[list[str]]) -> None:
    os.environ["RANK"] = "1"
    start_processes(options("fsdp2"), ["train"])
    assert executed == []
    assert os.environ["FSDP_VERSION"] == "2"


def test_one_process_is_this_one(executed: list[list[str]]) -> None:
    start_processes(options("single_gpu"), ["train"])
    assert executed == []


@pytest.mark.parametrize(
    ("cards", "remedy"), [(0, r"has 0 GPUs\. Take cpu_gloo"), (4, r"Add --num_processes 4")]
)
def test_more_processes_than_gpus_are_refused(
    executed: list[list[str]], monkeypatch: pytest.MonkeyPatch, cards: int, remedy: str
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: cards)
    with pytest.raises(InputError, match=rf"starts 8 processes.*{remedy}"):
        start_processes(options("multi_gpu"), ["train"])


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"FSDP_VERSION": "1"}, r"fsdp_version is 1\. Set 2"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, r"Set model\.checkpoint_activations"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, r"only one process has weights\. Set false"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, r"fsdp_offload_params is true"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, r"DeepSpeed is not supported.*fsdp2"),
    ],
)
def test_fsdp_that_endex_does_not_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], message: str
) -> None:
    for name, value in {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", **variables}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        sharding_wanted("fp32")


def test_fp16_with_shards_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(InputError, match=r"precision fp16 .* Set bf16"):
        sharding_wanted("fp16")
