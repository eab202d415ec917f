"""Encoder: transformer or token bag, pooling, normalisation, prompt. The only importer of `transformers`.

Shapes: B texts, L tokens, D dimensions.

A saved encoder is a sentence-transformers folder in its legacy layout, which sentence-transformers, vLLM and
text-embeddings-inference all read; pooling, prompts, normalisation and lengths are part of it.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

from retriever.data import Tokens
from retriever.errors import InputError
from retriever.folder import read_json, write_json
from retriever.token_bag import TokenBag, bag_tokens

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Encoder", "EncoderSettings", "Pooling", "resolve_model"]

Pooling = Literal["cls", "mean", "last"]
ST_POOLING: dict[str, str] = {  # our name -> the flag in 1_Pooling/config.json
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
ST_NORMALIZE = "sentence_transformers.models.Normalize"
STATIC_FOLDER = "0_StaticEmbedding"  # where published models have it; text-embeddings-inference looks there


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """How token embeddings become one vector; saved with the weights.

    Attributes:
        pooling: Which token embeddings are used: the first, the mean of all, or the last. A static encoder has
            the mean only.
        normalize: Divide the vector by its Euclidean norm.
        max_length: Tokens kept of a text, prompt and special tokens included.
        query_prompt: Text put before every query.
        document_prompt: Text put before every document.
    """

    pooling: Pooling = "mean"
    normalize: bool = True
    max_length: int = 256
    query_prompt: str = ""
    document_prompt: str = ""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            raise InputError(f"pooling must be one of {', '.join(get_args(Pooling))}, got {self.pooling!r}.")
        if self.max_length < 2:
            raise InputError(f"max_length must be at least 2 tokens, got {self.max_length}.")


class Encoder(nn.Module):
    """Turns texts into vectors with a transformer, or, in a static encoder, with the mean of token vectors.

    A static encoder puts no special tokens into the mean; a text without tokens has the vector zero.

    Args:
        backbone: A transformers model that returns `last_hidden_state`, or a `TokenBag`.
        tokenizer: Its tokenizer; of the library tokenizers for a `TokenBag`.
        settings: Pooling, normalisation, prompts and length.

    Raises:
        InputError: If the pooling of a `TokenBag` is not the mean.
    """

    def __init__(self, backbone: nn.Module, tokenizer: Any, settings: EncoderSettings) -> None:
        super().__init__()
        if isinstance(backbone, TokenBag) and settings.pooling != "mean":
            raise InputError(
                f"a static encoder pools by mean only, got pooling {settings.pooling!r}. Leave pooling out."
            )
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        if isinstance(self.backbone, TokenBag):
            return self.backbone.dim
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr,arg-type]

    def with_settings(self, **changes: Any) -> Encoder:
        """Return an encoder with other settings over the same weights."""
        return Encoder(self.backbone, self.tokenizer, replace(self.settings, **changes))

    def tokenize(self, texts: Sequence[str], prompt: str = "") -> Tokens:
        """Return token ids and attention mask, (B, L), of `prompt + text`, cut at `settings.max_length`."""
        prompted = [prompt + text for text in texts]
        if isinstance(self.backbone, TokenBag):
            return bag_tokens(self.tokenizer, prompted, self.settings.max_length)
        batch = self.tokenizer(
            prompted,
            padding=True,
            truncation=True,
            max_length=self.settings.max_length,
            return_tensors="pt",
        )
        return dict(batch)

    def forward(self, tokens: Tokens) -> Float[Tensor, "B D"]:
        """Return float32 embeddings of a batch of tokens."""
        if isinstance(self.backbone, TokenBag):
            vectors = self.backbone(tokens["input_ids"], tokens["attention_mask"]).float()
        else:
            hidden = self.backbone(**tokens).last_hidden_state  # (B, L, D)
            vectors = pool(hidden.float(), tokens["attention_mask"], self.settings.pooling)
        return F.normalize(vectors, dim=-1) if self.settings.normalize else vectors

    def save(self, folder: Path) -> None:
        """Write a sentence-transformers folder (legacy layout, safetensors)."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.backbone, TokenBag):
            self.backbone.save(folder / STATIC_FOLDER, self.tokenizer, self.settings.max_length)
            _write_modules(folder, self.settings, [(STATIC_FOLDER, ST_STATIC)])
            return
        with _quiet():
            self.backbone.save_pretrained(folder)  # type: ignore[operator]
        self.tokenizer.model_max_length = self.settings.max_length
        self.tokenizer.save_pretrained(folder)
        _write_pooling(folder, self.settings, self.dim)
        _write_modules(folder, self.settings, list(zip(("", "1_Pooling"), ST_MODULES, strict=True)))

    @classmethod
    def load(cls, model: str | Path, *, revision: str | None = None, **changes: Any) -> Encoder:
        """Load from a Hub name, a folder, or `package:NAME/FOLDER` (a folder inside an installed package).

        A sentence-transformers folder or repository brings its own settings; a plain transformers model gets
        the defaults of `EncoderSettings`. One that begins with a `StaticEmbedding` becomes a static encoder.

        Args:
            model: Name or path.
            revision: Branch, tag or commit of a Hub model.
            **changes: Settings that override the saved ones; None keeps them.

        Raises:
            InputError: If the model cannot be found or read.
        """
        source = resolve_model(str(model))
        given = {name: value for name, value in changes.items() if value is not None}
        modules = _read_modules(source, revision)
        if modules and modules[0][0] == "StaticEmbedding":
            backbone, tokenizer, longest = _load_token_bag(source, revision, modules[0][1])
        else:
            backbone, tokenizer, longest = _load_transformer(source, revision)
        settings = _read_sentence_transformers(source, revision, modules, longest)
        return cls(backbone, tokenizer, replace(settings, **given))


def _load_transformer(source: str, revision: str | None) -> tuple[nn.Module, Any, int]:
    """Return model, tokenizer and the most tokens that it takes."""
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            backbone = transformers.AutoModel.from_pretrained(source, revision=revision, dtype=torch.float32)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error
    if tokenizer.pad_token is None:  # decoder models often have none
        tokenizer.pad_token = tokenizer.eos_token
    positions = getattr(backbone.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return backbone, tokenizer, min(tokenizer.model_max_length, positions)


def _load_token_bag(source: str, revision: str | None, folder: str) -> tuple[nn.Module, Any, int]:
    """Return model, tokenizer and the length at which it cuts."""
    paths = []
    for name in ("model.safetensors", "tokenizer.json"):
        path = _hub_file(source, (Path(folder) / name).as_posix(), revision)
        if path is None:
            raise InputError(f"the static model {source!r} has no file {Path(folder) / name}. Restore it.")
        paths.append(path)
    return TokenBag.load(*paths)


def _cannot_load(source: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())[:300]
    return InputError(f"the model {source!r} cannot be loaded: {reason}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the progress bars of transformers, which stand in the way of ours."""
    enabled = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            transformers.utils.logging.enable_progress_bar()


def pool(hidden: Float[Tensor, "B L D"], mask: Tensor, pooling: Pooling) -> Float[Tensor, "B D"]:
    """Return one vector a text from its token embeddings; padding on either side is skipped."""
    rows = torch.arange(len(hidden), device=hidden.device)
    if pooling == "cls":
        return hidden[rows, mask.argmax(1)]
    if pooling == "mean":
        weights = mask.unsqueeze(-1).to(hidden.dtype)  # (B, L, 1)
        return (hidden * weights).sum(1) / weights.sum(1).clamp(min=1e-9)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # position of the last token that is not padding
    return hidden[rows, last]


def resolve_model(model: str) -> str:
    """Return the path behind `package:NAME/FOLDER`; any other name as it is.

    Raises:
        InputError: If the package is not installed or has no such folder.
    """
    if not model.startswith("package:"):
        return model
    name, _, folder = model.removeprefix("package:").partition("/")
    if not name.isidentifier():
        raise InputError(
            f"the model {model!r} must have the form package:NAME/FOLDER with a package's import name."
        )
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        hint = f"pip install {name.replace('_', '-')}"
        raise InputError(
            f"the model {model!r} needs the Python package {name!r}, which is not installed: {hint}."
        )
    path = Path(next(iter(spec.submodule_search_locations))) / folder
    if not path.is_dir():
        raise InputError(f"the model {model!r} is not there: {path} is not a folder.")
    return str(path)


def _write_pooling(folder: Path, settings: EncoderSettings, dim: int) -> None:
    write_json(
        folder / "sentence_bert_config.json", {"max_seq_length": settings.max_length, "do_lower_case": False}
    )
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {flag: pooling == settings.pooling for pooling, flag in ST_POOLING.items()}
    write_json(
        folder / "1_Pooling" / "config.json",
        {"word_embedding_dimension": dim, **flags, "include_prompt": True},
    )


def _write_modules(folder: Path, settings: EncoderSettings, modules: list[tuple[str, str]]) -> None:
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
            "__version__": {"transformers": transformers.__version__, "pytorch": torch.__version__},
            "prompts": {"query": settings.query_prompt, "document": settings.document_prompt},
            "default_prompt_name": None,
            "similarity_fn_name": "cosine" if settings.normalize else "dot",
        },
    )


def _hub_file(source: str, name: str, revision: str | None) -> Path | None:
    """Return the path of a file of a model folder or Hub repository; None if it has no such file."""
    found = transformers.utils.cached_file(
        source,
        name,
        revision=revision,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _read_modules(source: str, revision: str | None) -> list[tuple[str, str]]:
    """Return (kind, folder) of the modules of a sentence-transformers folder or repository; none if it is none."""
    try:
        path = _hub_file(source, "modules.json", revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error
    if path is None:
        return []
    try:
        modules = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(module["type"]).rsplit(".", 1)[-1], str(module["path"])) for module in modules]
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}. Restore the file.") from None
    except (KeyError, TypeError):
        raise InputError(f"{path} must be a list of modules with type and path. Restore the file.") from None
    kinds = [kind for kind, _ in found]
    static = kinds[:1] == ["StaticEmbedding"]
    carried = ("StaticEmbedding", "Normalize") if static else ("Transformer", "Pooling", "Normalize")
    unknown = [kind for kind in kinds if kind not in carried]
    if unknown:
        raise InputError(
            f"the model {source!r} has a module {unknown[0]!r} after its {kinds[0] if static else 'transformer'}, "
            f"which Endex does not carry. Use a model of {', '.join(carried[:-1])} and {carried[-1]} only."
        )
    return found


def _read_sentence_transformers(
    source: str, revision: str | None, modules: list[tuple[str, str]], longest: int
) -> EncoderSettings:
    """Return the settings that a sentence-transformers folder or repository states; defaults if it is none.

    `longest` is the model's own limit, which counts where no length is written (sentence-transformers >= 5.4).
    """
    if not modules:
        return EncoderSettings()
    folders = dict(modules)
    settings: dict[str, Any] = {"normalize": "Normalize" in folders, "max_length": longest}
    if "Pooling" in folders:
        path = _hub_file(source, f"{folders['Pooling']}/config.json", revision)
        settings["pooling"] = _read_pooling(read_json(path), str(source)) if path else "mean"
    path = _hub_file(source, "sentence_bert_config.json", revision)
    if path and "Transformer" in folders:
        transformer = read_json(path)
        if transformer.get("do_lower_case"):
            raise InputError(f"the model {source!r} sets do_lower_case, which Endex leaves to the tokenizer.")
        if length := transformer.get("max_seq_length"):
            settings["max_length"] = length
    if path := _hub_file(source, "config_sentence_transformers.json", revision):
        prompts = read_json(path).get("prompts") or {}
        settings["query_prompt"] = prompts.get("query") or ""
        settings["document_prompt"] = prompts.get("document") or prompts.get("passage") or ""
    return EncoderSettings(**settings)


def _read_pooling(config: dict[str, Any], source: str) -> Pooling:
    if config.get("include_prompt") is False:
        raise InputError(
            f"the model {source!r} leaves the prompt out of its pooling, which Endex does not do."
        )
    if compact := config.get("pooling_mode"):
        if isinstance(compact, str) and compact in ST_COMPACT:
            return ST_COMPACT[compact]
        raise InputError(f"the model {source!r} pools by {compact!r}; Endex knows {', '.join(ST_COMPACT)}.")
    active = [name for name, value in config.items() if name.startswith("pooling_mode_") and value is True]
    for pooling in get_args(Pooling):
        if active == [ST_POOLING[pooling]]:
            return pooling  # type: ignore[no-any-return]
    raise InputError(f"the model {source!r} pools by {active}; Endex knows {', '.join(ST_POOLING.values())}.")
