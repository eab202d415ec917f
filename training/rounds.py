"""Rounds: forward and backward of what a device holds at a time, whole; `training/chunked.py` does it in chunks.

Shapes: B queries, n documents of this device, N documents of all devices, D dimensions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retriever import Embeddings, InputError, TokenBatch
from retriever.distributed import all_gather
from training.run import TrainingRun
from training.scoring import Teacher, score_batch

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["NOTHING_LEARNS", "PreparedBatch", "Round", "RoundResult", "WholeRound"]

NOTHING_LEARNS = (
    "the loss reaches no parameter of the head, and the towers do not train. Choose another loss, or give the head "
    "losses of its own (head.distortion_weight)."
)


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """Tokens with their live negatives, vectors of a frozen document tower, and of the teacher, where there are."""

    tokens: TokenBatch
    known: Float[Tensor, "n D"] | None
    teacher: Teacher | None


@dataclass(frozen=True, slots=True)
class RoundResult:
    """Loss parts of a round by name, the documents after compression, (n, E), and what these stand for; detached."""

    parts: dict[str, Tensor]
    originals: Float[Tensor, "n E"]
    reconstruction: Float[Tensor, "n E"]


class Round(ABC):
    """Adds the gradient of a round to the parameters.

    Args:
        run: Model, loss and devices.
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self.optimization = run.experiment.optimization

    @abstractmethod
    def __call__(self, chunks: Sequence[TokenBatch], *, compress: bool, last: bool) -> RoundResult:
        """Run forward and backward.

        Args:
            chunks: The round's batch, on the device.
            compress: Put the documents through the head.
            last: This round is the step's last, after which the devices average their gradients.
        """

    def _prepare(self, tokens: TokenBatch, compress: bool) -> PreparedBatch:
        """Add what the batch is scored with beside its own documents."""
        run = self.run
        with run.accelerator.autocast():
            tokens = run.candidates.extend(tokens, run.model, compressed=compress)
            known = run.candidates.known_vectors(tokens)
            return PreparedBatch(tokens, known, run.candidates.teach(tokens, known))

    def _head_losses(self, vectors: Embeddings, tokens: TokenBatch, compress: bool) -> dict[str, Tensor]:
        """Return the head's own losses, once its codes are counted and kept for live negatives."""
        if compress:
            codes = all_gather(vectors.compressed.codes)
            self.run.model.head.count(codes)
            self.run.candidates.renew(all_gather(tokens.document_keys), codes)
        return {f"head_{name}": value for name, value in vectors.compressed.losses.items()}

    def _sum(self, parts: dict[str, Tensor]) -> Tensor:
        """Return the number whose gradient, averaged over the devices and summed over rounds, is the step's."""
        scaled = torch.stack([self._scale(name) * value for name, value in parts.items()])
        return scaled.sum() / self.optimization.accumulation

    def _scale(self, name: str) -> int:
        """Return the factor of a loss part whose gradient is averaged over the devices.

        In mode `full` every device has the gradient of the whole loss by its own vectors, and the sum is wanted.
        """
        whole = self.optimization.cross_device == "full" and self.optimization.world_scale == "exact"
        return self.run.processes if whole and not name.startswith("head_") else 1

    def _zero(self, vectors: Embeddings) -> Tensor:
        """Return 0 with a path to all vectors: DDP waits for the gradient of what it has returned, used or not."""
        own = (vectors.queries, vectors.documents, vectors.mapped_queries)
        head = vectors.compressed
        made = (*own, head.reconstruction, head.mapped, head.coarse, head.log_assignment)
        return 0 * torch.stack([v.sum() for v in made if v is not None and v.requires_grad]).sum()

    def _synchronized(self, last: bool) -> AbstractContextManager[None]:
        """Return the context of a backward pass: only the last of a step averages over the devices."""
        return nullcontext() if last else self.run.accelerator.no_sync(self.run.wrapped)


class WholeRound(Round):
    """One forward and one backward pass."""

    def __call__(self, chunks: Sequence[TokenBatch], *, compress: bool, last: bool) -> RoundResult:
        """Run them; see `Round`."""
        (chunk,) = chunks
        run = self.run
        with self._synchronized(last):
            batch = self._prepare(chunk, compress)
            vectors = run.wrapped(batch.tokens, compress, batch.known)
            scored = score_batch(
                vectors,
                batch.tokens,
                metric=run.model.head.metric,
                mode=self.optimization.cross_device,
                teacher=batch.teacher,
            )
            parts = {**run.loss(scored), **self._head_losses(vectors, batch.tokens, compress)}
            loss = self._sum(parts)
            if not loss.requires_grad:
                raise InputError(NOTHING_LEARNS)
            run.accelerator.backward(loss if run.processes == 1 else loss + self._zero(vectors))
        detached = {name: value.detach() for name, value in parts.items()}
        return RoundResult(detached, scored.originals.detach(), scored.reconstruction.detach())
