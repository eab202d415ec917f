"""DualEncoderConfig: the towers to start from, and how they train.

Shapes: D dimensions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import numpy as np
import torch
from torch.nn import functional as F

from retriever.backbone import compile_layers, recompute_layers
from retriever.data import Document
from retriever.dual_encoder import DualEncoder
from retriever.encoder import Encoder, EncoderSettings, Pooling
from retriever.errors import InputError
from retriever.heads import HeadConfig
from retriever.lora import LoraConfig, add_lora
from retriever.vector_input import VectorInput

__all__ = ["DualEncoderConfig"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
STANDARDIZING_SAMPLE = 65_536  # training vectors that mean and scale are taken from


@dataclass(frozen=True, kw_only=True)
class DualEncoderConfig:
    """The towers to start from.

    Attributes:
        encoder: Model of both towers: a Hub name, a folder, or `package:NAME/FOLDER` for a model inside an
            installed Python package. "vectors" where the data are vectors, which the towers then leave to the head.
        document_encoder: Another model for the document tower; implies tie = false.
        revision: Branch, tag or commit of a Hub model.
        tie: Both towers share one set of weights.
        pooling: "cls", "mean" or "last"; by default what the model's folder says, else "mean".
        normalize: Unit vectors, so that the inner product is the cosine; by default what the folder says, else true;
            of vectors false.
        standardize: Vectors: subtract the training vectors' mean and divide by their root mean squared length, which
            keeps their order by L2; by default where the head's metric is l2.
        query_prompt: Text before every query; by default what the folder says, else none.
        document_prompt: Text before every document; by default what the folder says, else none.
        query_max_length: Tokens kept of a query.
        document_max_length: Tokens kept of a document.
        title_separator: Text between a document's title and its text.
        projection: Dimension D of the vectors: a tower whose model has another gets a linear layer that trains with it,
            so that towers of different sizes meet, or vectors become shorter; by default the models' own.
        lora: Train low-rank adapters instead of the towers' weights; merged into them where a model is saved.
        dtype: Type of the towers' weights in memory; bfloat16 halves it where adapters train, or no tower does.
        attention: Implementation of attention as transformers names it: "sdpa", "eager", "flash_attention_2" (a GPU
            and the package flash-attn), or a kernel of the Hub; by default transformers' choice, mostly "sdpa".
        checkpoint_activations: Keep only the inputs of each layer, and compute it again on the way back: less memory
            for one more forward pass.
        compile: Compile the towers' layers with torch.compile: a slow start, faster steps after.
    """

    encoder: str
    document_encoder: str | None = None
    revision: str | None = None
    tie: bool = True
    pooling: Pooling | None = None
    normalize: bool | None = None
    standardize: bool | None = None
    query_prompt: str | None = None
    document_prompt: str | None = None
    query_max_length: int = 64
    document_max_length: int = 256
    title_separator: str = " "
    projection: int | None = None
    lora: LoraConfig | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    attention: str | None = None
    checkpoint_activations: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")
        if self.projection is not None and self.projection < 1:
            raise InputError(f"model.projection must be positive, got {self.projection}.")
        options = ("projection", "lora", "attention", "checkpoint_activations", "compile")
        chosen = [name for name in options if getattr(self, name)]
        if self.takes_vectors and chosen:
            raise InputError(f"model.encoder vectors has no transformer. Leave out model.{chosen[0]}.")

    @property
    def takes_vectors(self) -> bool:
        """Whether the data are vectors instead of texts."""
        return self.encoder == "vectors"

    def build(self, head: HeadConfig, documents: Mapping[str, Document] | None = None) -> DualEncoder:
        """Load the towers and put the head on them.

        Args:
            head: The compression head.
            documents: Training documents, from which towers of vectors take dimension, mean and scale.

        Raises:
            InputError: If a model cannot be loaded, the towers' dimensions differ or the head does not fit.
        """
        if self.takes_vectors:
            return self._build_on_vectors(head, documents or {})
        query = self._load(self.encoder, self.query_max_length)
        if self.tie and self.document_encoder is None:
            document = query.with_settings(max_length=self.document_max_length)
        else:
            document = self._load(self.document_encoder or self.encoder, self.document_max_length)
        if query.dim != document.dim:
            raise InputError(
                f"the towers must have the same dimension, got {query.dim} for queries ({self.encoder}) and "
                f"{document.dim} for documents ({self.document_encoder}). Set model.projection {query.dim} or "
                f"{document.dim}, or choose models of one dimension."
            )
        built = head.build(query.dim)
        if built.metric == "l2" and not (query.settings.normalize and document.settings.normalize):
            raise InputError(
                "the head's metric l2 needs unit vectors, but the model does not normalize. "
                "Set metric inner_product, or model.normalize true."
            )
        return DualEncoder(query, document, built, title_separator=self.title_separator)

    def _load(self, model: str, max_length: int) -> Encoder:
        """Return one tower, ready to train."""
        tower = Encoder.load(
            model,
            revision=self.revision,
            attention=self.attention,
            dtype=DTYPES[self.dtype],
            max_length=max_length,
            pooling=self.pooling,
            normalize=self.normalize,
            query_prompt=self.query_prompt,
            document_prompt=self.document_prompt,
        )
        if self.projection is not None:
            tower = tower.projected(self.projection)
        if self.lora is not None:
            add_lora(tower.backbone, self.lora)
        if self.checkpoint_activations:
            recompute_layers(tower)
        if self.compile:
            compile_layers(tower)
        return tower

    def _build_on_vectors(self, head: HeadConfig, documents: Mapping[str, Document]) -> DualEncoder:
        if self.document_encoder or self.pooling or self.query_prompt or self.document_prompt:
            raise InputError(
                "model.encoder vectors has no other tower, pooling or prompt. Leave out document_encoder, pooling, "
                "query_prompt and document_prompt."
            )
        step = max(1, len(documents) // STANDARDIZING_SAMPLE)
        vectors = [document.vector for document in islice(documents.values(), 0, None, step)]
        given = [vector for vector in vectors if vector is not None]
        if not given or len(given) < len(vectors):
            raise InputError(
                "model.encoder vectors needs vectors to train on, got texts. Give data.source vector files."
            )
        sample = torch.from_numpy(np.stack(given))
        settings = EncoderSettings(normalize=bool(self.normalize))
        built = head.build(sample.shape[1])
        standardize = built.metric == "l2" if self.standardize is None else self.standardize
        if standardize and built.metric != "l2":
            raise InputError(
                "model.standardize changes the order by inner product. Set the head's metric l2, or leave it out."
            )
        if standardize:
            backbone = VectorInput.standardizing(F.normalize(sample, dim=-1) if self.normalize else sample)
        else:
            backbone = VectorInput.identity(sample.shape[1])
        tower = Encoder(backbone, None, settings)
        return DualEncoder(tower, tower.with_settings(), built, title_separator=self.title_separator)
