"""Encoder: a transformer, token bag or vectors, and what follows. The only importer of `transformers`.

Shapes: B texts, L tokens, D dimensions.

A saved encoder is a sentence-transformers folder in its legacy layout, which sentence-transformers, vLLM and
text-embeddings-inference all read; pooling, prompts, normalisation and lengths are part of it.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from retriever.data import Query, Tokens
from retriever.errors import InputError
from retriever.folder import read_json, write_json
from retriever.last_token import append_end_token
from retriever.lora import merge_lora, save_adapter
from retriever.projection import load_dense, new_dense, save_dense
from retriever.st_folder import (
    ST_DENSE,
    ST_MODULES,
    ST_STATIC,
    Pooling,
    read_modules,
    read_pooling,
    write_modules,
    write_pooling,
)
from retriever.token_bag import TokenBag
from retriever.tokenizing import bag_tokens, transformer_tokens
from retriever.vector_input import VectorInput

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Encoder", "EncoderSettings", "Pooling", "resolve_model"]

ADAPTER_FOLDER = "lora_adapter"  # in a folder of its own, or transformers would put it on the merged weights
STATIC_FOLDER = "0_StaticEmbedding"  # where published models have it; text-embeddings-inference looks there
VECTORS = "vectors.json"  # marks the folder of a tower of vectors, which is no sentence-transformers model


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderSettings:
    """How token embeddings become one vector; saved with the weights.

    Attributes:
        pooling: Which token embeddings are used: the first, the mean of all, or the last. A static encoder has
            the mean only.
        normalize: Divide the vector by its Euclidean norm; a tower of vectors does so before it centres and scales.
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

    A tower of vectors takes vectors in the place of texts. A static encoder puts no special tokens into the mean; a
    text without tokens has the vector zero.

    Args:
        backbone: A transformers model that returns `last_hidden_state`, a `TokenBag` or a `VectorInput`.
        tokenizer: Its tokenizer; of the library tokenizers for a `TokenBag`, None for a `VectorInput`.
        settings: Pooling, normalisation, prompts and length.
        projection: Linear layers between pooling and normalisation; none by default.

    Raises:
        InputError: If the pooling of a `TokenBag` is not the mean.
    """

    def __init__(
        self,
        backbone: nn.Module,
        tokenizer: Any,
        settings: EncoderSettings,
        projection: nn.Sequential | None = None,
    ) -> None:
        super().__init__()
        if isinstance(backbone, TokenBag) and settings.pooling != "mean":
            raise InputError(
                f"a static encoder pools by mean only, got pooling {settings.pooling!r}. Leave pooling out."
            )
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.settings = settings
        self.projection = nn.Sequential() if projection is None else projection

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return int(self.projection[-1].out_features) if len(self.projection) else self.width  # type: ignore[arg-type]

    @property
    def width(self) -> int:
        """Dimension E of the pooled token embeddings."""
        if isinstance(self.backbone, TokenBag | VectorInput):
            return self.backbone.dim
        return int(self.backbone.config.hidden_size)  # type: ignore[union-attr,arg-type]

    @property
    def takes_vectors(self) -> bool:
        """Whether queries and documents are vectors instead of texts."""
        return isinstance(self.backbone, VectorInput)

    def with_settings(self, **changes: Any) -> Encoder:
        """Return an encoder with other settings over the same weights."""
        return Encoder(self.backbone, self.tokenizer, replace(self.settings, **changes), self.projection)

    def with_own_tokenizer(self) -> Encoder:
        """Return an encoder over the same weights for another thread: a tokenizer must not work for two at once."""
        return Encoder(self.backbone, copy.deepcopy(self.tokenizer), self.settings, self.projection)

    def projected(self, dim: int) -> Encoder:
        """Return an encoder whose vectors have `dim` dimensions: itself, or one with a new linear layer behind it."""
        if dim == self.dim:
            return self
        layers = nn.Sequential(*self.projection, new_dense(self.dim, dim))
        return Encoder(self.backbone, self.tokenizer, self.settings, layers)

    def layers(self) -> list[nn.Module]:
        """Return the transformer's layers, of which each can be recomputed or sharded as a whole."""
        return [
            module for module in self.backbone.modules() if isinstance(module, GradientCheckpointingLayer)
        ]

    def tokenize(self, texts: Sequence[Query], prompt: str = "") -> Tokens:
        """Return token ids and attention mask, (B, L), of `prompt + text`, cut at `settings.max_length`; or vectors.

        Raises:
            InputError: If it is given vectors and takes texts, or the other way.
        """
        if isinstance(self.backbone, VectorInput):
            return self.backbone.gather(texts)
        prompted = [prompt + _text(text) for text in texts]
        if isinstance(self.backbone, TokenBag):
            return bag_tokens(self.tokenizer, prompted, self.settings.max_length)
        if self.tokenizer.is_fast:
            return transformer_tokens(self.tokenizer, prompted, self.settings.max_length)
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
        if isinstance(self.backbone, VectorInput):
            rows = tokens["vectors"]
            return self.backbone(F.normalize(rows, dim=-1) if self.settings.normalize else rows)  # type: ignore[no-any-return]
        if isinstance(self.backbone, TokenBag):
            vectors = self.backbone(tokens["input_ids"], tokens["attention_mask"]).float()
        else:
            hidden = self.backbone(**tokens).last_hidden_state  # (B, L, D)
            vectors = pool(hidden.float(), tokens["attention_mask"], self.settings.pooling)
        vectors = self.projection(vectors).float()
        return F.normalize(vectors, dim=-1) if self.settings.normalize else vectors

    def save(self, folder: str | Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Write a sentence-transformers folder (legacy layout, safetensors), adapters merged; or a tower of vectors."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.backbone, VectorInput):
            self.backbone.save(folder)
            write_json(folder / VECTORS, {"dim": self.dim, "normalize": self.settings.normalize})
            return
        if isinstance(self.backbone, TokenBag):
            self.backbone.save(folder / STATIC_FOLDER, self.tokenizer, self.settings.max_length)
            modules = [(STATIC_FOLDER, ST_STATIC)]
        else:
            prefix, weights = "backbone.", self.state_dict() if weights is None else weights
            own = {n.removeprefix(prefix): value for n, value in weights.items() if n.startswith(prefix)}
            _save_transformer(self.backbone, folder, own)
            self.tokenizer.model_max_length = self.settings.max_length
            self.tokenizer.save_pretrained(folder)
            write_pooling(folder, self.settings, self.width)
            modules = list(zip(("", "1_Pooling"), ST_MODULES, strict=True))
        for layer in self.projection:
            modules.append((f"{len(modules)}_Dense", ST_DENSE))
            save_dense(layer, folder / modules[-1][0])  # type: ignore[arg-type]
        write_modules(folder, self.settings, modules, transformers.__version__)

    @classmethod
    def load(
        cls,
        model: str | Path,
        *,
        revision: str | None = None,
        attention: str | None = None,
        dtype: torch.dtype = torch.float32,
        **changes: Any,
    ) -> Encoder:
        """Load from a Hub name, a folder, or `package:NAME/FOLDER` (a folder inside an installed package).

        A sentence-transformers folder or repository brings its own settings; a plain transformers model gets
        the defaults of `EncoderSettings`, and, pooled by its last token, an end token behind every text. One that
        begins with a `StaticEmbedding` becomes a static encoder. Padding is always on the right.

        Args:
            model: Name or path.
            revision: Branch, tag or commit of a Hub model.
            attention: Implementation of a transformer's attention, as transformers names it; by default its own
                choice, "sdpa" where the model has it.
            dtype: Type of a transformer's weights.
            **changes: Settings that override the saved ones; None keeps them.

        Raises:
            InputError: If the model cannot be found or read.
        """
        source = resolve_model(str(model))
        given = {name: value for name, value in changes.items() if value is not None}
        if (Path(source) / VECTORS).is_file():
            stored = EncoderSettings(normalize=bool(read_json(Path(source) / VECTORS)["normalize"]))
            return cls(VectorInput.load(Path(source)), None, replace(stored, **given))
        modules = _read_modules(source, revision)
        if modules and modules[0][0] == "StaticEmbedding":
            if attention is not None:
                raise InputError(
                    f"the static model {source!r} has no attention to choose, got {attention!r}."
                )
            backbone, tokenizer, longest = _load_token_bag(source, revision, modules[0][1])
        else:
            backbone, tokenizer, longest = _load_transformer(source, revision, attention, dtype)
        settings = replace(_read_sentence_transformers(source, revision, modules, longest), **given)
        if settings.pooling == "last" and not modules:
            append_end_token(tokenizer)
        dense = [folder for kind, folder in modules if kind == "Dense"]
        names = ("config.json", "model.safetensors")
        layers = [load_dense(*_files(source, revision, folder, names)) for folder in dense]
        return cls(backbone, tokenizer, settings, nn.Sequential(*layers))


def _text(item: Query) -> str:
    if not isinstance(item, str):
        raise InputError("this model takes texts, got a vector. Set model.encoder vectors, or give texts.")
    return item


def _load_transformer(
    source: str, revision: str | None, attention: str | None, dtype: torch.dtype
) -> tuple[nn.Module, Any, int]:
    """Return model, tokenizer and the most tokens that it takes."""
    chosen = {} if attention is None else {"attn_implementation": attention}
    try:
        with _quiet():
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, revision=revision)
            backbone = transformers.AutoModel.from_pretrained(
                source, revision=revision, dtype=dtype, **chosen
            )
    except (OSError, ValueError, ImportError) as error:
        raise _cannot_load(source, error) from error
    if getattr(backbone.config, "use_cache", False):
        backbone.config.use_cache = False  # keys and values of a decoder, kept for tokens that never come
    tokenizer.padding_side = "right"  # absolute positions then begin at 0, and length groups can cut
    if tokenizer.pad_token is None:  # decoder models often have none
        tokenizer.pad_token = tokenizer.eos_token
    positions = getattr(backbone.config, "max_position_embeddings", None) or tokenizer.model_max_length
    return backbone, tokenizer, min(tokenizer.model_max_length, positions)


def _load_token_bag(source: str, revision: str | None, folder: str) -> tuple[nn.Module, Any, int]:
    """Return model, tokenizer and the length at which it cuts."""
    return TokenBag.load(*_files(source, revision, folder, ("model.safetensors", "tokenizer.json")))


def _save_transformer(backbone: Any, folder: Path, state: dict[str, Tensor]) -> None:
    adapted = hasattr(backbone, "peft_config")
    with _quiet():
        backbone.save_pretrained(folder, state_dict=merge_lora(backbone, state) if adapted else state)
    if adapted:
        config = read_json(folder / "config.json")
        write_json(
            folder / "config.json", {**config, "dtype": "float32"}
        )  # transformers wrote that of the base
        save_adapter(backbone, state, folder / ADAPTER_FOLDER)


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


def _files(source: str, revision: str | None, folder: str, names: Sequence[str]) -> list[Path]:
    """Return the paths of files that a folder of a model must have."""
    paths = []
    for name in names:
        path = _hub_file(source, (Path(folder) / name).as_posix(), revision)
        if path is None:
            raise InputError(f"the model {source!r} has no file {Path(folder) / name}. Restore it.")
        paths.append(path)
    return paths


def _read_modules(source: str, revision: str | None) -> list[tuple[str, str]]:
    """Return (kind, folder) of the modules of a sentence-transformers folder or repository; none if it is none."""
    try:
        path = _hub_file(source, "modules.json", revision)
    except (OSError, ValueError) as error:
        raise _cannot_load(source, error) from error
    if path is None:
        return []
    return read_modules(path, source)


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
        settings["pooling"] = read_pooling(read_json(path), str(source)) if path else "mean"
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
