"""Gradient caching: a batch of any size in the memory of a chunk (Gao et al., RepL4NLP 2021, arXiv:2101.06983).

Shapes: B queries, n documents of this device, N documents of all devices, D dimensions.

1. The vectors of every chunk, without a graph; the state of the random numbers before each is kept.
2. Head and loss on the vectors of all chunks and devices at once, which gives the gradient of the head's parameters and
   of the vectors. Scores are made for a block of queries at a time: the gradients of the blocks add up in what they are
   made of, and go back through the head together.
3. Every chunk again, with a graph and the same random numbers, and back from its vectors' gradient.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from retriever import Embeddings, InputError, TokenBatch
from training.rounds import NOTHING_LEARNS, PreparedBatch, Round, RoundResult
from training.run import TrainingRun
from training.scoring import JoinedBatch, join_batch

__all__ = ["ChunkedRound", "RandomState"]

SCORES_AT_ONCE = 2**22  # of a block of queries with all documents: 16 MiB a matrix of float32
REPEATS = (
    0.05  # relative distance of a chunk's vectors in both passes; other dropout moves them by 0.1 and more
)


class ChunkedRound(Round):
    """Two forward passes and one backward pass of the towers, chunk by chunk; one pass of head and loss."""

    def __init__(self, run: TrainingRun) -> None:
        super().__init__(run)
        self._checked = False

    def __call__(self, chunks: Sequence[TokenBatch], *, compress: bool, last: bool) -> RoundResult:
        """Run them; see `Round`."""
        batches, states, first = [], [], []
        for chunk in chunks:
            batches.append(self._prepare(chunk, compress))
            states.append(RandomState(self.run.accelerator.device))
            with torch.no_grad():
                first.append(self._embed(batches[-1]))
        model, known = self.run.model, batches[0].known is not None
        queries = torch.cat([vectors.queries for vectors in first])
        documents = torch.cat([vectors.documents for vectors in first])
        queries.requires_grad_(_trains(model.query_encoder))
        documents.requires_grad_(_trains(model.document_encoder) and not known)
        towers = queries.requires_grad or documents.requires_grad
        alone = last and not towers  # no second pass in which devices could average their gradients
        with self._synchronized(alone):
            result = self._head_and_loss(queries, documents, batches, compress, zero=alone)
        if towers:
            wanted = zip(
                _split(queries.grad, [len(vectors.queries) for vectors in first]),
                _split(documents.grad, [len(vectors.documents) for vectors in first]),
                strict=True,
            )
            for number, gradients in enumerate(wanted):
                end = number == len(batches) - 1
                with self._synchronized(last and end), states[number].replayed():
                    self._second_pass(batches[number], first[number], gradients)
        return result

    def _embed(self, batch: PreparedBatch) -> Embeddings:
        """Return the towers' vectors of a chunk; the head stays out."""
        vectors: Embeddings = self.run.wrapped(batch.tokens, False, batch.known)
        return vectors

    def _second_pass(
        self, batch: PreparedBatch, first: Embeddings, gradients: tuple[Tensor | None, Tensor | None]
    ) -> None:
        """Encode a chunk once more, and go back; what has no gradient is not encoded, or DDP would wait for it."""
        queries, documents = gradients
        vectors: Embeddings = self.run.wrapped(
            batch.tokens,
            False,
            first.documents if documents is None else None,
            first.queries if queries is None else None,
        )
        self._check_repeated(vectors, first)
        _backward((vectors.queries, vectors.documents), gradients)

    def _head_and_loss(
        self,
        queries: Tensor,
        documents: Tensor,
        batches: Sequence[PreparedBatch],
        compress: bool,
        *,
        zero: bool,
    ) -> RoundResult:
        """Return the loss parts; give the head's parameters and the towers' vectors their gradients."""
        run, tokens = self.run, _join([batch.tokens for batch in batches])
        vectors: Embeddings = run.wrapped(tokens, compress, documents, queries)
        teachers = [batch.teacher for batch in batches if batch.teacher is not None]
        joined = join_batch(
            vectors,
            tokens,
            metric=run.model.head.metric,
            mode=self.optimization.cross_device,
            teacher=(torch.cat([q for q, _ in teachers]), torch.cat([d for _, d in teachers]))
            if teachers
            else None,
        )
        leaves, cuts = _cut(joined)
        parts = self._losses_by_blocks(leaves)
        outputs, gradients = [tensor for tensor, _ in cuts], [leaf.grad for _, leaf in cuts]
        if head_losses := self._head_losses(vectors, tokens, compress):
            parts |= {name: value.detach() for name, value in head_losses.items()}
            outputs.append(self._scaled(self._sum(head_losses)))
            gradients.append(torch.ones_like(outputs[-1]))
        if zero and run.processes > 1:
            outputs.append(self._zero(vectors))
            gradients.append(torch.zeros_like(outputs[-1]))
        _backward(outputs, gradients)
        originals = joined.documents if joined.mapped is None else joined.mapped
        return RoundResult(parts, originals.detach(), joined.reconstruction.detach())

    def _losses_by_blocks(self, joined: JoinedBatch) -> dict[str, Tensor]:
        """Return the loss parts, and add their gradient to that of the leaves: the mean over blocks of queries."""
        loss, count = self.run.loss, len(joined.queries)
        blocks = loss.by_queries(lists=joined.candidate_coarse is not None)
        size = max(1, SCORES_AT_ONCE // len(joined.candidates)) if blocks else count
        totals: dict[str, Tensor] = {}
        for start in range(0, count, size):
            rows = slice(start, min(start + size, count))
            share = (rows.stop - rows.start) / count
            parts = {name: share * value for name, value in loss(joined.score(rows)).items()}
            if (total := self._sum(parts)).requires_grad:
                self._scaled(total).backward()
            for name, value in parts.items():
                totals[name] = totals[name] + value.detach() if name in totals else value.detach()
        return totals

    def _scaled(self, loss: Tensor) -> Tensor:
        """Return the loss as fp16 needs it."""
        scaler = self.run.accelerator.scaler
        return scaler.scale(loss) if scaler else loss

    def _check_repeated(self, second: Embeddings, first: Embeddings) -> None:
        """Raise InputError if the towers do not repeat themselves; looked at once, as it waits for the device."""
        if self._checked:
            return
        self._checked = True
        before, after = (torch.cat([v.queries, v.documents]).detach() for v in (first, second))
        if not bool((after - before).norm() <= REPEATS * before.norm()):
            raise InputError(
                "optimization.chunk_size needs towers that give the same vectors twice from the same random numbers, "
                "but these do not. Set optimization.dropout false, or chunk_size 0."
            )


class RandomState:
    """The random numbers that PyTorch would draw next, on the CPU and on a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = None if device.type == "cpu" else torch.get_device_module(device)
        self._cpu = torch.get_rng_state()
        self._own = self._module.get_rng_state(device) if self._module else None

    @contextmanager
    def replayed(self) -> Iterator[None]:
        """Draw them again inside; go on as before afterwards."""
        devices = [self._device] if self._module else []
        with torch.random.fork_rng(devices, device_type=self._device.type if devices else "cuda"):
            torch.set_rng_state(self._cpu)
            if self._module:
                self._module.set_rng_state(self._own, self._device)
            yield


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _join(batches: Sequence[TokenBatch]) -> TokenBatch:
    """Return the batch of all chunks, without its tokens."""
    width = max(batch.relevant_keys.shape[1] for batch in batches)
    relevant = [F.pad(b.relevant_keys, (0, width - b.relevant_keys.shape[1])) for b in batches]
    scores = [batch.teacher_scores for batch in batches if batch.teacher_scores is not None]
    positives, first = [], 0
    for batch in batches:
        positives.append(batch.positives + first)
        first += len(batch.document_keys)
    return TokenBatch(
        queries={},
        documents={},
        document_keys=torch.cat([batch.document_keys for batch in batches]),
        relevant_keys=torch.cat(relevant),
        positives=torch.cat(positives),
        teacher_scores=torch.cat(scores) if scores else None,
    )


def _cut(joined: JoinedBatch) -> tuple[JoinedBatch, list[tuple[Tensor, Tensor]]]:
    """Return the same vectors as leaves, and pairs of a vector with a graph and its leaf."""
    found = {field.name: getattr(joined, field.name) for field in fields(joined)}
    found = {n: v for n, v in found.items() if isinstance(v, Tensor) and v.requires_grad}
    pairs = {id(value): (value, value.detach().requires_grad_()) for value in found.values()}
    leaves = replace(joined, **{name: pairs[id(value)][1] for name, value in found.items()})
    return leaves, list(pairs.values())


def _split(gradient: Tensor | None, sizes: Sequence[int]) -> Sequence[Tensor | None]:
    return [None] * len(sizes) if gradient is None else gradient.split(list(sizes))


def _backward(outputs: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Go back from the outputs that have a graph and a gradient."""
    kept = [(o, g) for o, g in zip(outputs, gradients, strict=True) if o.requires_grad and g is not None]
    if not kept:
        raise InputError(NOTHING_LEARNS)
    torch.autograd.backward([output for output, _ in kept], [gradient for _, gradient in kept])
