"""What a batch is scored with beside its own documents, and what is known of it beforehand.

Shapes: B queries, N documents, D dimensions.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from retriever import Document, DualEncoder, TokenBatch
from retriever.disk import document_keys, document_rows
from retriever.heads import NoCompressionConfig
from training.corpus import Embed, TrainingCorpus
from training.experiment import Experiment, LiveNegativesConfig
from training.sharding import whole

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Candidates", "build_candidates", "freeze_towers", "frozen_copy"]


class Candidates(nn.Module):
    """Live negatives, vectors of frozen towers, and scores of a frozen teacher.

    Args:
        live: Which live negatives to add.
        corpus: All documents, where live negatives or a frozen document tower need them by row.
        teacher: A frozen copy of the towers, where the loss needs it.
    """

    def __init__(
        self, live: LiveNegativesConfig, corpus: TrainingCorpus | None, teacher: DualEncoder | None
    ) -> None:
        super().__init__()
        self.live = live
        self.corpus = corpus
        self.teacher = teacher

    def known_vectors(self, batch: TokenBatch) -> Float[Tensor, "N D"] | None:
        """Return the documents' vectors where a frozen tower has made them already."""
        if self.corpus is None or self.corpus.vectors is None:
            return None
        return self.corpus.vectors[self.corpus.rows(batch.document_keys)]

    @torch.no_grad()
    def teach(
        self, batch: TokenBatch, known: Float[Tensor, "N D"] | None
    ) -> tuple[Float[Tensor, "B D"], Float[Tensor, "N D"]] | None:
        """Return the teacher's vectors of a batch, None without a teacher."""
        if self.teacher is None:
            return None
        documents = self.teacher.encode_documents(batch.documents).float() if known is None else known
        return self.teacher.encode_queries(batch.queries).float(), documents

    @torch.no_grad()
    def extend(self, batch: TokenBatch, model: DualEncoder, *, compressed: bool) -> TokenBatch:
        """Append the documents that the model ranks high for the queries now.

        Args:
            batch: Queries and their own documents.
            model: Embeds the queries.
            compressed: Whether the head has started, so that there are codes to rank by.
        """
        live = self.live
        if not live.per_query or self.corpus is None or not (compressed or live.by == "dense"):
            return batch
        queries, by_codes = model.encode_queries(batch.queries).float(), live.by == "compressed"
        positives = batch.document_keys[batch.positives]
        rows = self.corpus.hardest(
            queries,
            batch.relevant_keys,
            model.head,
            count=live.per_query,
            depth=live.depth,
            compressed=by_codes,
            limits=self.corpus.limits(
                queries,
                positives,
                model.head,
                margin=live.margin,
                max_relative=live.max_relative,
                compressed=by_codes,
            ),
        )
        own = self.corpus.rows(positives).repeat_interleave(len(rows) // len(queries))
        rows = torch.where(rows < 0, own, rows)  # a copy of the positive counts for no query
        keys = self.corpus.keys[rows.cpu()].to(rows.device)
        if self.corpus.vectors is not None:
            return batch.with_documents({}, keys)
        tokens = model.tokenize_documents([self.corpus.documents[row] for row in rows.tolist()])
        return batch.with_documents({name: value.to(rows.device) for name, value in tokens.items()}, keys)

    @torch.no_grad()
    def start(self, model: DualEncoder, embed: Embed) -> None:
        """Take over the towers as they are at the head's start, and the first codes of the corpus."""
        if self.teacher is not None:
            for name in ("query_encoder", "document_encoder"):
                weights = whole(getattr(model, name).state_dict(), everywhere=True)
                getattr(self.teacher, name).load_state_dict(weights)
        self.refresh(model, embed)

    def refresh(self, model: DualEncoder, embed: Embed) -> None:
        """Make the codes of the corpus anew, where live negatives are ranked by them."""
        if self.corpus is not None and self.corpus.codes.numel():
            self.corpus.encode(model.head, embed)

    def renew(self, keys: Int[Tensor, " N"], codes: Int[Tensor, "N M"]) -> None:
        """Keep the codes that documents have just been given, where live negatives are ranked by codes."""
        if self.corpus is not None and self.corpus.codes.numel():
            self.corpus.renew(keys, codes)


def frozen_copy(model: DualEncoder) -> DualEncoder:
    """Return a copy of the towers, tied as they are, that does not train; it has no head."""
    query, document = copy.deepcopy((model.query_encoder, model.document_encoder))
    head = NoCompressionConfig().build(model.dim)
    return (
        DualEncoder(query, document, head, title_separator=model.title_separator).requires_grad_(False).eval()
    )


def freeze_towers(model: DualEncoder, which: str) -> None:
    """Stop the gradients of the towers that do not train: "none", "documents" or "both"."""
    if which in ("documents", "both"):
        model.document_encoder.requires_grad_(False)
    if which == "both":
        model.query_encoder.requires_grad_(False)


def build_candidates(
    experiment: Experiment, model: DualEncoder, documents: Mapping[str, Document], embed: Embed
) -> Candidates:
    """Return what an experiment needs: the corpus by row, its vectors where they do not change, a teacher."""
    live, frozen, head = experiment.live_negatives, experiment.optimization.freeze != "none", model.head
    corpus = None
    if live.per_query or frozen:
        coded = live.per_query and live.by == "compressed"
        bytes_do = head.code_bits <= 8 and head.code_size <= head.num_codes
        corpus = TrainingCorpus(
            document_rows(documents),
            head.num_codes if coded else 0,
            code_dtype=torch.uint8 if bytes_do else torch.int32,
            keys=torch.from_numpy(document_keys(documents)),
        )
    if corpus is not None and frozen:
        corpus.embed(embed)
    return Candidates(live, corpus, frozen_copy(model) if experiment.loss.needs_teacher else None)
