"""DualEncoder: query tower, document tower and compression head as one model, and its folder on disk.

Shapes: B queries, N documents, L tokens, D dimensions, E dimensions in the head's space, M codes a document.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retriever.data import Document, Query, TokenBatch, Tokens
from retriever.encoder import Encoder
from retriever.errors import InputError
from retriever.folder import check_folder, publish_folder, read_json, write_json
from retriever.heads import HEADS, CompressionHead, HeadConfig, HeadOutput, NoCompressionConfig
from retriever.transforms.batch_norm import inference

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["DualEncoder", "Embeddings", "load_head", "load_query_map", "save_head"]


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Vectors of a batch: queries (B, D), documents (N, D), and what the head makes of both.

    Attributes:
        queries: Of the query tower.
        documents: Of the document tower, uncompressed.
        compressed: The head's output on the documents.
        mapped_queries: Queries in the space of the reconstructions.
    """

    queries: Float[Tensor, "B D"]
    documents: Float[Tensor, "N D"]
    compressed: HeadOutput
    mapped_queries: Float[Tensor, "B E"]


class DualEncoder(nn.Module):
    """Two towers and a compression head on the documents.

    Args:
        query_encoder: Tower of the queries.
        document_encoder: Tower of the documents; may share its backbone with the query tower (tied).
        head: Compression of the document vectors.
        title_separator: Text between a document's title and its text.
    """

    def __init__(
        self,
        query_encoder: Encoder,
        document_encoder: Encoder,
        head: CompressionHead,
        *,
        title_separator: str = " ",
    ) -> None:
        super().__init__()
        self.query_encoder = query_encoder
        self.document_encoder = document_encoder
        self.head = head
        self.title_separator = title_separator
        self.groups_lengths = True  # encode the documents of a batch in groups of like length
        self._identity = NoCompressionConfig().build(head.dim)

    @property
    def tied(self) -> bool:
        """Whether the towers share their weights."""
        return self.query_encoder.backbone is self.document_encoder.backbone

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.head.dim

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(chain(self.parameters(), self.buffers())).device

    @property
    def takes_vectors(self) -> bool:
        """Whether queries and documents are vectors instead of texts."""
        return self.query_encoder.takes_vectors

    def format_document(self, document: Document) -> Query:
        """Return the text of a document as the tower sees it, without the prompt; or its vector."""
        if document.vector is not None:
            return document.vector
        return f"{document.title}{self.title_separator}{document.text}" if document.title else document.text

    def with_own_tokenizers(self) -> DualEncoder:
        """Return a model over the same weights that may tokenize in another thread."""
        towers = (self.query_encoder.with_own_tokenizer(), self.document_encoder.with_own_tokenizer())
        return DualEncoder(*towers, self.head, title_separator=self.title_separator)

    def tokenize_queries(self, texts: Sequence[Query]) -> Tokens:
        """Return tokens of queries, prompt included."""
        return self.query_encoder.tokenize(texts, self.query_encoder.settings.query_prompt)

    def tokenize_documents(self, documents: Sequence[Document]) -> Tokens:
        """Return tokens of documents, prompt and title included."""
        texts = [self.format_document(document) for document in documents]
        return self.document_encoder.tokenize(texts, self.document_encoder.settings.document_prompt)

    def encode_queries(self, tokens: Tokens) -> Float[Tensor, "B D"]:
        """Return the vectors of queries."""
        return self.query_encoder(tokens)  # type: ignore[no-any-return]

    def encode_documents(self, tokens: Tokens) -> Float[Tensor, "N D"]:
        """Return the vectors of documents, uncompressed."""
        return self.document_encoder(tokens)  # type: ignore[no-any-return]

    def compress(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Return the codes of document vectors, as the finished model makes them."""
        with inference(self.head):
            return self.head.encode(x)

    def forward(
        self,
        batch: TokenBatch,
        compress: bool = True,
        documents: Float[Tensor, "N D"] | None = None,
        queries: Float[Tensor, "B D"] | None = None,
    ) -> Embeddings:
        """Return the vectors of a batch; the head is the identity unless `compress`.

        Args:
            batch: Tokens of queries and documents.
            compress: Put the documents through the head.
            documents: Vectors of the documents, where they are known already.
            queries: Vectors of the queries, likewise.
        """
        if documents is None:
            encode = encode_by_length if self.groups_lengths else Encoder.__call__
            documents = encode(self.document_encoder, batch.documents)
        if queries is None:
            queries = self.encode_queries(batch.queries)
        head = self.head if compress else self._identity
        return Embeddings(queries, documents, *head.compress_batch(documents, queries))

    def save(
        self,
        folder: str | Path,
        *,
        overwrite: bool = False,
        files: Mapping[str, str] | None = None,
        about: Mapping[str, Any] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Publish the model folder atomically.

        Args:
            folder: Where to; must not exist unless `overwrite`.
            overwrite: Replace an existing folder once the new one is complete.
            files: Further text files by name (`experiment.yaml`, `README.md`).
            about: Further entries of the manifest.
            weights: The model's state dict, whole, where its own is sharded.
        """
        with publish_folder(Path(folder), "model", overwrite=overwrite, about=dict(about or {})) as path:
            weights = self.state_dict() if weights is None else weights
            if self.tied:
                self.document_encoder.save(path / "encoder", _below("document_encoder.", weights))
            else:
                self.query_encoder.save(path / "query_encoder", _below("query_encoder.", weights))
                self.document_encoder.save(path / "document_encoder", _below("document_encoder.", weights))
            sides = {"query": self.query_encoder, "document": self.document_encoder}
            write_json(
                path / "dual_encoder.json",
                {
                    "tied": self.tied,
                    "title_separator": self.title_separator,
                    **{f"{side}_settings": asdict(tower.settings) for side, tower in sides.items()},
                },
            )
            save_head(self.head, path / "head")
            for name, text in (files or {}).items():
                (path / name).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> DualEncoder:
        """Load a model folder after checking every file against its manifest.

        Raises:
            InputError: If the folder is not a whole, undamaged model folder.
        """
        folder = Path(folder)
        check_folder(folder, "model")
        config = read_json(folder / "dual_encoder.json")
        settings = {side: config[f"{side}_settings"] for side in ("query", "document")}
        if config["tied"]:
            document = Encoder.load(folder / "encoder", **settings["document"])
            query = document.with_settings(**settings["query"])
        else:
            document = Encoder.load(folder / "document_encoder", **settings["document"])
            query = Encoder.load(folder / "query_encoder", **settings["query"])
        model = cls(query, document, load_head(folder / "head"), title_separator=config["title_separator"])
        return model.eval()


def _below(prefix: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}


def encode_by_length(encoder: Encoder, tokens: Tokens) -> Float[Tensor, "N D"]:
    """Return the vectors of texts, in groups of like length where that saves a quarter of the padding or more.

    Live and given negatives come in any length, and one long text pads all others.
    """
    if "attention_mask" not in tokens:
        return encoder(tokens)  # type: ignore[no-any-return]
    groups = length_groups(tokens["attention_mask"])
    if len(groups) == 1:
        return encoder(tokens)  # type: ignore[no-any-return]
    parts = [
        encoder({name: value[rows, :length] for name, value in tokens.items()}) for rows, length in groups
    ]
    return torch.cat(parts)[torch.cat([rows for rows, _ in groups]).argsort()]


def length_groups(mask: Int[Tensor, "N L"], *, groups: int = 4, fewest: int = 8) -> list[tuple[Tensor, int]]:
    """Return rows and tokens of each group; one group of all where grouping does not pay, or padding is on the left.

    Args:
        mask: Attention mask.
        groups: Groups to make.
        fewest: Rows below which a group would leave the device idle.
    """
    count, width = mask.shape
    whole = [(torch.arange(count, device=mask.device), width)]
    if count < groups * fewest or not bool(mask[:, 0].all()):
        return whole
    lengths, order = mask.sum(1).sort(stable=True)
    parts = [
        (rows, int(longest[-1]))
        for rows, longest in zip(order.chunk(groups), lengths.chunk(groups), strict=True)
    ]
    kept = sum(len(rows) * length for rows, length in parts)
    return parts if kept <= 0.75 * count * width else whole


def model_fingerprint(folder: str | Path) -> str:
    """Return a SHA-256 over the checksums of towers and head: equal for copies of one model, else different."""
    files = check_folder(Path(folder), "model", full=False)["files"]
    relevant = sorted((name, entry["sha256"]) for name, entry in files.items() if name != "experiment.yaml")
    return hashlib.sha256(repr(relevant).encode()).hexdigest()


def save_head(head: CompressionHead, folder: Path) -> None:
    """Write `config.json` and `model.safetensors` of a head."""
    folder.mkdir(parents=True)
    write_json(folder / "config.json", {**_store_config(head.config), "dim": head.dim})
    state = {name: value.contiguous() for name, value in head.state_dict().items()}
    save_file(state, folder / "model.safetensors")


def load_head(folder: Path) -> CompressionHead:
    """Read a head's folder.

    Raises:
        InputError: If this version of Endex has no such head.
    """
    stored = read_json(folder / "config.json")
    head = _restore_config(stored, folder).build(stored["dim"])
    head.load_state_dict(load_file(folder / "model.safetensors"))
    return head


def load_query_map(folder: Path) -> CompressionHead | None:
    """Read a head's folder if it is there and queries must pass through the head (`map_queries`); else return None.

    Raises:
        InputError: If this version of Endex has no such head.
    """
    if not folder.is_dir():  # an index folder of 2026-11 and older
        return None
    config = _restore_config(read_json(folder / "config.json"), folder)
    return load_head(folder).eval() if config.maps else None


def _store_config(config: HeadConfig) -> dict[str, Any]:
    """Return a head's name and settings; those of a head inside it in the same form."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    settings = {n: _store_config(v) if isinstance(v, HeadConfig) else v for n, v in values.items()}
    return {"head": config.name, "config": settings}


def _restore_config(stored: dict[str, Any], folder: Path) -> HeadConfig:
    """Invert `_store_config`."""
    if stored["head"] not in HEADS:
        raise InputError(
            f"{folder} holds a head {stored['head']!r}; this Endex knows {', '.join(HEADS)}. Upgrade it."
        )
    settings = {
        name: _restore_config(value, folder) if isinstance(value, dict) else value
        for name, value in stored["config"].items()
    }
    return HEADS[stored["head"]](**settings)
