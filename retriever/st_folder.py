"""The files that make a folder a sentence-transformers model, in its legacy layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from retriever.errors import InputError
from retriever.folder import write_json

if TYPE_CHECKING:
    from retriever.encoder import EncoderSettings

__all__ = ["Pooling", "read_modules", "read_pooling", "write_modules", "write_pooling"]

Pooling = Literal["cls", "mean", "last"]
ST_POOLING: dict[Pooling, str] = {  # our name -> the flag in 1_Pooling/config.json
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "last": "pooling_mode_lasttoken",
}
ST_COMPACT: dict[str, Pooling] = {
    "cls": "cls",
    "mean": "mean",
    "lasttoken": "last",
}  # sentence-transformers >= 5.4
ST_MODULES = ["sentence_transformers.models.Transformer", "sentence_transformers.models.Pooling"]
ST_STATIC = "sentence_transformers.models.StaticEmbedding"
ST_DENSE = "sentence_transformers.models.Dense"
ST_NORMALIZE = "sentence_transformers.models.Normalize"


def write_pooling(folder: Path, settings: EncoderSettings, dim: int) -> None:
    """Write the pooling of vectors of `dim` dimensions, and the length."""
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": settings.max_length, "do_lower_case": False}
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: pooling == settings.pooling for pooling, flag in ST_POOLING.items()}
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": dim, **flags, "include_prompt": True},
    )


def write_modules(
    folder: Path, settings: EncoderSettings, modules: list[tuple[str, str]], transformers_version: str
) -> None:
    """Write `modules.json` and the prompts; `modules` are (folder, type) without the normalisation."""
    if settings.normalize:
        modules = [*modules, (f"{len(modules)}_Normalize", ST_NORMALIZE)]
        (folder / modules[-1][0]).mkdir(exist_ok=True)  # sentence-transformers expects the folder, empty
    write_json(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)],
    )
    write_json(
        folder / "config_sentence_transformers.json",
        {
            "__version__": {"transformers": transformers_version, "pytorch": torch.__version__},
            "prompts": {"query": settings.query_prompt, "document": settings.document_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )


def read_modules(path: Path, source: str) -> list[tuple[str, str]]:
    """Return (kind, folder) of the modules that a `modules.json` lists.

    Raises:
        InputError: If it is not such a list, or Endex does not carry a module, or their order.
    """
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in modules]
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. Restore the file.") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} must be a list of modules with type and path. Restore the file.") from None
    kinds = [kind for kind, _ in found]
    static = kinds[:1] == ["StaticEmbedding"]
    carried = (["StaticEmbedding"] if static else ["Transformer", "Pooling"]) + ["Dense", "Normalize"]
    unknown = [kind for kind in kinds if kind not in carried]
    if unknown:
        raise InputError(
            f"the model {source!r} has a module {unknown[0]!r} after its {kinds[0] if static else 'transformer'}, "
            f"which Endex does not carry. Use a model of {', '.join(carried[:-1])} and {carried[-1]} only."
        )
    if sorted(kinds, key=carried.index) != kinds:
        raise InputError(
            f"the model {source!r} has its modules in the order {', '.join(kinds)}; Endex carries {', '.join(carried)} "
            "in this order only."
        )
    return found


def read_pooling(config: dict[str, Any], source: str) -> Pooling:
    """Return the pooling that a `1_Pooling/config.json` states, in the legacy or the compact form.

    Raises:
        InputError: If Endex has no such pooling.
    """
    if config.get("include_prompt") is False:
        raise InputError(
            f"the model {source!r} leaves the prompt out of its pooling, which Endex does not do."
        )
    if compact := config.get("pooling_mode"):
        if isinstance(compact, str) and compact in ST_COMPACT:
            return ST_COMPACT[compact]
        raise InputError(f"the model {source!r} pools by {compact!r}; Endex knows {', '.join(ST_COMPACT)}.")
    active = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    for pooling, flag in ST_POOLING.items():
        if active == [flag]:
            return pooling
    raise InputError(f"the model {source!r} pools by {active}; Endex knows {', '.join(ST_POOLING.values())}.")
