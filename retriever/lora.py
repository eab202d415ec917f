"""Low-rank adapters of a backbone (LoRA; Hu et al., ICLR 2022, arXiv:2106.09685), by peft.

Shapes: W a weight (out, in), A (rank, in) and B (out, rank) its adapter. The layer computes W x + (alpha / rank) B A x;
what is saved is W + (alpha / rank) B A, so that a tower loads where peft is not installed.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import save_file
from torch import Tensor, nn

from retriever.errors import InputError

__all__ = ["LoraConfig", "add_lora", "merge_lora", "save_adapter"]

ADAPTER = "default"  # peft's name of an adapter that was given none
BASE, DOWN, UP = ".base_layer.", f".lora_A.{ADAPTER}.", f".lora_B.{ADAPTER}."


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Adapters that train in the place of a backbone's weights.

    Attributes:
        rank: Rank of the adapters.
        alpha: Their outputs are multiplied by alpha / rank.
        dropout: Share of an adapter's inputs that are set to zero in training.
        target_modules: Linear layers that get one: the ends of their names, for example [q_proj, v_proj], or
            "all-linear".
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: list[str] | Literal["all-linear"] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise InputError(f"model.lora.rank must be at least 1, got {self.rank}.")
        if self.alpha < 1:
            raise InputError(f"model.lora.alpha must be at least 1, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise InputError(f"model.lora.dropout must be at least 0 and below 1, got {self.dropout}.")
        if isinstance(self.target_modules, str) and self.target_modules != "all-linear":
            raise InputError(
                f"model.lora.target_modules must be all-linear or a list, got {self.target_modules!r}."
            )


def add_lora(backbone: nn.Module, config: LoraConfig) -> None:
    """Put adapters beside linear layers of a transformers model, in place; nothing else of it trains afterwards.

    Adapters are float32 also where the weights are not, and begin with B = 0: the model computes what it did.

    Raises:
        InputError: If peft is missing, or the model has no such layers.
    """
    try:
        import peft
    except ModuleNotFoundError:
        raise InputError("model.lora needs peft. Run: pip install 'endex[lora]'") from None

    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=config.target_modules,
    )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "fan_in_fan_out"
            )  # which peft sets right by itself, and says so
            peft.inject_adapter_in_model(settings, backbone)
    except ValueError as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"model.lora.target_modules {config.target_modules} does not fit: {reason}"
        ) from None
    for adapter in (value for value in backbone.parameters() if value.requires_grad):
        adapter.data = adapter.data.float()
    others = [name for name in backbone.state_dict() if "lora_" in name and not {DOWN, UP} & _marks(name)]
    if others:
        raise InputError(
            f"model.lora adapts linear layers only, got {others[0]!r}. Choose other target_modules."
        )


def merge_lora(backbone: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the state dict of the model without adapters that computes what the model with them does.

    Merged weights are float32: bfloat16 would round most of what an adapter adds away.

    Args:
        backbone: Tells the factor of each adapter; its own weights are not read.
        state: Its state dict, whole and not sharded.
    """
    merged = {
        name.replace(BASE, "."): value for name, value in state.items() if not {DOWN, UP} & _marks(name)
    }
    for name, module in backbone.named_modules():
        down = state.get(f"{name}{DOWN}weight")
        if down is None:
            continue
        delta = module.scaling[ADAPTER] * (state[f"{name}{UP}weight"].float() @ down.float())
        weight = merged[f"{name}.weight"].float()
        merged[f"{name}.weight"] = weight + (delta.T if module.fan_in_fan_out else delta)
    return merged


def save_adapter(backbone: nn.Module, state: Mapping[str, Tensor], folder: Path) -> None:
    """Write the adapters as peft's folder, to be put on the weights that the training started from."""
    folder.mkdir()
    backbone.peft_config[ADAPTER].save_pretrained(folder)  # type: ignore[index,union-attr]
    adapters = {
        f"base_model.model.{name.replace(f'.{ADAPTER}.', '.')}": value.contiguous()
        for name, value in state.items()
        if {DOWN, UP} & _marks(name)
    }
    save_file(adapters, folder / "adapter_model.safetensors")


def _marks(name: str) -> set[str]:
    return {mark for mark in (DOWN, UP) if mark in name}
