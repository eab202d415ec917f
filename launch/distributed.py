"""`endex train ... --accelerate_config NAME|FILE`: accelerate's configuration files, applied and started.

A file says two things. How the model is distributed (a copy on each device, FSDP2) goes into the environment that
accelerate reads, also under `torchrun` or another launcher. How many processes there are counts where none has started
them yet: then `endex` becomes `torchrun --no-python endex train ...`.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from retriever import InputError

__all__ = [
    "CONFIGS",
    "LaunchConfig",
    "accelerate_environment",
    "start_processes",
    "take_options",
    "torchrun_words",
]

CONFIGS = Path(__file__).parent / "accelerate"
OPTIONS = ("num_processes", "num_machines", "machine_rank", "main_process_ip", "main_process_port")
KINDS = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP")
EMPTY = ("deepspeed_config", "megatron_lm_config", "parallelism_config", "dynamo_config", "fp8_config")


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchConfig:
    """What of an accelerate configuration Endex uses.

    Attributes:
        name: Its name or path, for messages.
        distributed_type: "NO", "MULTI_GPU", "MULTI_CPU" or "FSDP".
        num_processes: Of all machines.
        num_machines: Machines.
        machine_rank: Number of this machine, from 0.
        main_process_ip: Host of machine 0.
        main_process_port: Port of machine 0; any free one on a single machine.
        use_cpu: Train on the CPU even where there are GPUs.
        fsdp_config: FSDP's settings, as accelerate names them.
    """

    name: str
    distributed_type: str = "NO"
    num_processes: int = 1
    num_machines: int = 1
    machine_rank: int = 0
    main_process_ip: str | None = None
    main_process_port: int | None = None
    use_cpu: bool = False
    fsdp_config: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.distributed_type not in KINDS:
            raise InputError(
                f"{self.name} has distributed_type {self.distributed_type!r}, which Endex does not train under. Choose "
                f"one of {', '.join(KINDS)}; FSDP shards what DeepSpeed's ZeRO shards."
            )
        if self.num_processes < 1 or self.num_processes % self.num_machines:
            raise InputError(
                f"{self.name} has num_processes {self.num_processes}, which must be a multiple of num_machines "
                f"{self.num_machines}. Set --num_processes."
            )
        if self.num_machines > 1 and not (self.main_process_ip and self.main_process_port):
            raise InputError(
                f"{self.name} has {self.num_machines} machines, which must know the first one. Add --main_process_ip "
                "HOST --main_process_port PORT --machine_rank N."
            )


def take_options(words: list[str]) -> tuple[list[str], LaunchConfig | None]:
    """Return the words without those of this module, and the configuration they name; None if they name none.

    Raises:
        InputError: If there is no such configuration, or Endex does not do what it asks for.
    """
    rest: list[str] = []
    found: dict[str, str] = {}
    pending = iter(words)
    for word in pending:
        name, equals, value = word.removeprefix("--").partition("=")
        if word.startswith("--") and name in ("accelerate_config", *OPTIONS):
            found[name] = value if equals else next(pending, "")
        else:
            rest.append(word)
    name = found.pop("accelerate_config", "")
    if not name:
        if found:
            raise InputError(
                f"--{next(iter(found))} needs --accelerate_config NAME, one of {_names()}, or a file."
            )
        return rest, None
    return rest, _read(name, found)


def _read(name: str, options: Mapping[str, str]) -> LaunchConfig:
    path = (
        CONFIGS / f"{name}.yaml" if "/" not in name and not name.endswith((".yaml", ".yml")) else Path(name)
    )
    if not path.is_file():
        raise InputError(f"--accelerate_config {name} is neither a file nor one of {_names()}.")
    try:
        stored = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(stored, dict):
        raise InputError(f"{path} is no accelerate configuration. Write one with: accelerate config")
    if unused := next((key for key in EMPTY if stored.get(key)), None):
        raise InputError(
            f"{path} has a {unused}, which Endex does not use. Remove it, or take one of {_names()}."
        )
    if stored.get("mixed_precision") not in (None, "no", False):
        raise InputError(
            f"{path} has mixed_precision {stored['mixed_precision']}. Remove it: optimization.precision decides."
        )
    try:
        numbers = {key: value if key == "main_process_ip" else int(value) for key, value in options.items()}
    except ValueError:
        wrong = next(key for key, value in options.items() if not value.isdigit())
        raise InputError(f"--{wrong} must be a number, got {options[wrong]!r}.") from None
    known = {
        key: stored[key] for key in (*OPTIONS, "distributed_type", "use_cpu") if stored.get(key) is not None
    }
    fsdp = stored.get("fsdp_config") or {}
    return LaunchConfig(name=name, fsdp_config=fsdp, **{**known, **numbers})


def _names() -> str:
    return ", ".join(sorted(path.stem for path in CONFIGS.glob("*.yaml")))


def accelerate_environment(config: LaunchConfig) -> dict[str, str]:
    """Return the variables that tell accelerate how the model is distributed, as `accelerate launch` sets them."""
    found = {"ACCELERATE_USE_CPU": "true"} if config.use_cpu else {}
    if config.distributed_type == "FSDP":
        names = {key: f"FSDP_{key.removeprefix('fsdp_').upper()}" for key in config.fsdp_config}
        values = {names[key]: str(value) for key, value in config.fsdp_config.items()}
        found |= {"ACCELERATE_USE_FSDP": "true"}
        found |= {
            name: value.lower() if value in ("True", "False") else value for name, value in values.items()
        }
    return found


def torchrun_words(config: LaunchConfig) -> list[str]:
    """Return the options of torchrun that start this machine's processes."""
    words = ["--nproc_per_node", str(config.num_processes // config.num_machines)]
    if config.num_machines == 1 and config.main_process_port is None:
        return ["--standalone", *words]
    words += ["--nnodes", str(config.num_machines), "--node_rank", str(config.machine_rank)]
    host = config.main_process_ip or "127.0.0.1"
    return [*words, "--master_addr", host, "--master_port", str(config.main_process_port)]


def start_processes(config: LaunchConfig, verb_words: list[str]) -> None:
    """Become `torchrun --no-python endex VERB ...`, unless a launcher has started this process, or one is enough.

    Raises:
        InputError: If this machine has too few GPUs.
    """
    os.environ.update(accelerate_environment(config))
    if "RANK" in os.environ or config.num_processes == 1:
        return
    _check_devices(config)
    endex = Path(sys.executable).with_name("endex")
    program = str(endex) if endex.is_file() else shutil.which("endex")
    if program is None:
        raise InputError("the command `endex` is not on the PATH, where torchrun looks for it.")
    words = [sys.executable, "-m", "torch.distributed.run", *torchrun_words(config), "--no-python", program]
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [*words, *verb_words])  # signals then reach torchrun, which hands them on


def _check_devices(config: LaunchConfig) -> None:
    wanted, cards = config.num_processes // config.num_machines, torch.cuda.device_count()
    on_cpu = os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("true", "1", "yes")
    if on_cpu or wanted <= cards:
        return
    remedy = f"Add --num_processes {cards * config.num_machines}" if cards else "Take cpu_gloo"
    raise InputError(
        f"--accelerate_config {config.name} starts {wanted} processes on this machine, which has {cards} GPUs. "
        f"{remedy}."
    )
