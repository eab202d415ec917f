"""TrainingRun: everything that a training loop works with, made from an experiment.

Devices, data, model, optimizer, batches, checkpoints; the loop itself is in `training/trainer.py`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import islice
from pathlib import Path

import torch
from accelerate import (
    Accelerator,
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
)
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from retriever import (
    Collator,
    Document,
    InputError,
    Query,
    RetrievalData,
    TokenBatch,
    embed_documents,
    embed_queries,
    read_data,
)
from retriever.data import document_key
from retriever.disk import document_ids
from retriever.heads import QuantizerFit
from retriever.pseudo_queries import crop
from training.candidates import build_candidates, freeze_towers
from training.checkpoint import Progress, checkpoint_folder, load_checkpoint, save_checkpoint
from training.data import MixedPairs, MixedPlan, join_sets, read_sets
from training.evaluate import embed_in_shares, search_exhaustively, select_evaluation
from training.experiment import Experiment, OptimizationConfig
from training.negatives import BatchPlan, PairDataset
from training.optimizer import parameter_groups
from training.prefetch import prefetch
from training.recipe import dump_experiment
from training.run_folder import checkpoint_to_continue, clear_leftovers, depends_on_processes
from training.sharding import ShardedDualEncoder, sharding_wanted, whole, whole_moments

__all__ = ["TrainingRun"]

COLLECTIVE_TIMEOUT = timedelta(hours=2)
"""How long processes wait for each other. NCCL's ten minutes end a run in which the first one clusters the head's
sample or writes a large model to a slow disk. Where a process dies, torchrun ends the others at once."""
PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class TrainingRun:
    """Devices, data, model, optimizer and progress of one run.

    Args:
        experiment: The whole configuration.
        fit: Gives heads their starting values.
        start_vectors: Returns the vectors that the starting towers give documents, where they are known already.

    Raises:
        InputError: If data or model are not fit for the run.
    """

    def __init__(
        self,
        experiment: Experiment,
        fit: QuantizerFit,
        start_vectors: Callable[[Sequence[Document]], Tensor] | None = None,
    ) -> None:
        self.experiment, self.quantizer_fit, self.start_vectors = experiment, fit, start_vectors
        self.folder = Path(experiment.output)
        self.progress = Progress()
        optimization = experiment.optimization
        self.sharded = sharding_wanted(optimization.precision)
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        self.accelerator = Accelerator(
            mixed_precision=PRECISIONS[optimization.precision],
            log_with=experiment.tracking.trackers or None,
            project_dir=str(self.folder),
            cpu=_processes_share_cpus(),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=True),
                InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
            ],
        )
        self.processes = self.accelerator.num_processes
        self._check_batch(optimization)
        with self.accelerator.main_process_first():  # a corpus on disk is indexed once
            sets = read_sets(experiment.data, scored=experiment.loss.needs_scores)
        self.data, self.sets = join_sets(sets)
        torch.manual_seed(experiment.seed)
        self.model = experiment.model.build(experiment.head, self.data.documents).to(self.accelerator.device)
        self.evaluation = self._read_evaluation()
        self.loss = experiment.loss.build()
        freeze_towers(self.model, optimization.freeze)
        self._check_chunks(optimization)
        self.candidates = build_candidates(experiment, self.model, self.data.documents, self.embed)
        self.corpus = self.candidates.corpus
        self._plan_pairs()
        compresses = experiment.head.name != "none"
        experiment.head.check_sample(min(len(self._warm_start_ids()), optimization.warm_start_documents))
        self.head_start = round(optimization.dense_warmup * self.steps) if compresses else self.steps
        self.state = nn.ModuleDict({"model": self.model, "loss": self.loss, "candidates": self.candidates})
        self.state.to(self.accelerator.device)
        self._distribute(optimization)

    def _distribute(self, optimization: OptimizationConfig) -> None:
        """Give the model to the processes, whole or in shards, and make its optimizer."""
        self.sharded = self.sharded and self.processes > 1
        if self.sharded:
            self.wrapped: nn.Module = ShardedDualEncoder(self.model, optimization.precision)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.model, optimization), fused=True)
        if not self.sharded:
            self.wrapped, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def whole_weights(self) -> dict[str, Tensor]:
        """Return the model's weights by name, of all shards; all processes must call it together."""
        return whole(self.model.state_dict())

    def rounds(self) -> Iterator[list[TokenBatch]]:
        """Yield this device's batches in chunks: `accumulation` rounds of each remaining step."""
        optimization = self.experiment.optimization
        size = optimization.batch_size // (optimization.accumulation * self.processes)
        chunk = min(optimization.chunk_size or size, size)
        offsets = [
            (a * self.processes + self.accelerator.process_index) * size
            for a in range(optimization.accumulation)
        ]
        plan = self.plan.steps(self.progress.step, self.steps, slice(None))
        frozen = optimization.freeze != "none"  # documents are then vectors already
        tokenizing = self.model.with_own_tokenizers()
        loader = DataLoader(
            self.dataset,
            batch_sampler=(
                batch[start + first : start + min(first + chunk, size)]
                for batch in plan
                for start in offsets
                for first in range(0, size, chunk)
            ),
            collate_fn=Collator(
                tokenizing.tokenize_queries, (lambda _: {}) if frozen else tokenizing.tokenize_documents
            ),
            generator=torch.Generator(),  # its own, or its start would draw from the step's random numbers
        )
        chunks = math.ceil(size / chunk)
        batches = prefetch(loader, depth=2 * chunks)
        while found := list(islice(batches, chunks)):
            yield [batch.to(self.accelerator.device) for batch in found]

    def embed(self, documents: Sequence[Document]) -> Tensor:
        """Return the current vectors of documents, on the device; every process embeds a share."""
        if self.start_vectors and self.progress.step == 0:
            return self.start_vectors(documents).to(self.accelerator.device)
        precision = self.experiment.optimization.precision
        return embed_in_shares(
            documents,
            lambda part: embed_documents(self.model, part, precision=precision),
            self.accelerator.device,
        )

    def warm_start(self) -> None:
        """Give the head its starting values from the current vectors of a sample of documents, and of queries."""
        vectors, queries = self.warm_start_samples()
        head = self.model.head
        if self.accelerator.is_main_process:
            head.warm_start_to_rank(vectors, queries, self.quantizer_fit, self.experiment.seed)
        if self.processes > 1:
            for value in head.state_dict().values():
                torch.distributed.broadcast(value, 0)
        self.loss.start(vectors, self.experiment.seed)
        self.candidates.start(self.model, self.embed)

    def warm_start_samples(self) -> tuple[Tensor, list[Tensor]]:
        """Return what `CompressionHead.warm_start_to_rank` takes: the current vectors of documents, and of queries."""
        documents = [self.data.documents[name] for name in self._sample(self._warm_start_ids())]
        if self.corpus is None or self.corpus.vectors is None:
            vectors = self.embed(documents)
        else:
            keys = torch.tensor([document_key(document.id) for document in documents])
            vectors = self.corpus.vectors[self.corpus.rows(keys)]
        return vectors, self._warm_start_queries(documents)

    def _warm_start_queries(self, documents: Sequence[Document]) -> list[Tensor]:
        """Return the current vectors of training queries, and of crops of the documents where the head wants them."""
        wanted = self.model.head.config
        if not wanted.learns_from_queries:
            return []
        names = sorted({query for query, _ in self.dataset.rows})
        kinds: list[Sequence[Query]] = [[self.data.queries[name] for name in self._sample(names)]]
        if wanted.wants_crops(0 if self.experiment.data.labels == "pseudo" else len(names)):
            kinds.append(crop(documents, self.experiment.seed))
        return [self._embed_queries(kind) for kind in kinds if kind]

    def _sample(self, names: Sequence[str]) -> list[str]:
        """Return as many of the names as the warm start has documents, drawn from the seed, or all."""
        generator = torch.Generator().manual_seed(self.experiment.seed)
        chosen = torch.randperm(len(names), generator=generator).tolist()
        return [names[row] for row in chosen[: self.experiment.optimization.warm_start_documents]]

    def _embed_queries(self, queries: Sequence[Query]) -> Tensor:
        """Return the current vectors of queries, on the device; every process embeds a share."""
        precision = self.experiment.optimization.precision
        return embed_in_shares(
            queries,
            lambda part: embed_queries(self.model, part, precision=precision),
            self.accelerator.device,
        )

    def restore(self, resume: bool) -> None:
        """Continue from the newest checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not resume:
            return
        if self.accelerator.is_main_process:
            clear_leftovers(self.folder)
        self.accelerator.wait_for_everyone()
        path = checkpoint_to_continue(self.folder, self.experiment)
        if path is None:
            return
        self.progress, scaler = load_checkpoint(path, model=self.state, optimizer=self.optimizer)
        reason = depends_on_processes(self.experiment)
        if self.progress.processes != self.processes and reason:
            raise InputError(
                f"{path} was written by {self.progress.processes} processes and cannot continue exactly on "
                f"{self.processes}: {reason}. Start as many processes as before."
            )
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)

    def save_checkpoint(self) -> Path:
        """Publish the state after this step, from the main process; return its folder."""
        folder = self.folder / "checkpoints"
        weights, moments = whole(self.state.state_dict()), whole_moments(self.optimizer.state_dict())
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.progress.processes = self.processes
            save_checkpoint(
                folder,
                weights=weights,
                moments=moments,
                progress=self.progress,
                experiment_yaml=dump_experiment(self.experiment),
                scaler=scaler.state_dict() if scaler else None,
                keep=self.experiment.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()
        return checkpoint_folder(folder, self.progress.step)

    def _plan_pairs(self) -> None:
        """Decide which pairs each step sees."""
        data, optimization = self.experiment.data, self.experiment.optimization
        if data.labels == "teacher":
            self.data = self._label_by_teacher()
            self.sets = [self.data]
        pairs, plans = [], []
        for config, part in zip(data.sets, self.sets, strict=True):
            dataset = PairDataset(part, data.negatives_per_query)
            del dataset.rows[config.max_pairs or len(dataset.rows) :]
            pairs.append(dataset)
            plans.append(
                BatchPlan(
                    lengths=[dataset.length(row) for row in range(len(dataset))],
                    batch_size=optimization.batch_size,
                    seed=self.experiment.seed,
                    bucket_batches=optimization.bucket_batches,
                )
            )
        self.dataset = MixedPairs(pairs)
        weights = [config.weight for config in data.sets]
        self.plan = MixedPlan(plans=plans, weights=weights, seed=self.experiment.seed)
        epochs = math.ceil(optimization.epochs * self.plan.batches_per_epoch)
        self.steps = optimization.steps or max(1, epochs)

    def _label_by_teacher(self) -> RetrievalData:
        """Give every query of the split the document that the towers rank first, in the place of its judgements."""
        queries = self._embed_queries([self.data.queries[name] for name in self.data.qrels])
        documents = self.embed(list(self.data.documents.values()))
        _, rows = search_exhaustively(queries, documents, 1, metric=self.model.head.metric)
        ids = list(self.data.documents)
        best = {name: {ids[row]: 1} for name, (row,) in zip(self.data.qrels, rows.tolist(), strict=True)}
        return replace(self.data, qrels=best)

    def _check_batch(self, optimization: OptimizationConfig) -> None:
        shares = optimization.accumulation * self.processes
        if optimization.batch_size % shares:
            raise InputError(
                f"optimization.batch_size must be a multiple of accumulation x processes, got "
                f"{optimization.batch_size} and {optimization.accumulation} x {self.processes}."
            )

    def _check_chunks(self, optimization: OptimizationConfig) -> None:
        if not optimization.chunk_size:
            return
        for tower in (self.model.query_encoder, self.model.document_encoder):
            for name, module in tower.named_modules():
                if isinstance(module, _BatchNorm):
                    raise InputError(
                        f"optimization.chunk_size encodes a batch in parts, but the tower's {name} normalizes by the "
                        f"whole batch, got {optimization.chunk_size}. Set chunk_size 0, or take another model."
                    )

    def _read_evaluation(self) -> RetrievalData:
        config, data = self.experiment.evaluation, self.experiment.data
        if data.labels == "pseudo" and data.evaluation_source is None:
            return select_evaluation(self.data, queries=config.queries, documents=config.documents)
        source = data.evaluation_source or data.source
        normalize = self.model.query_encoder.settings.normalize
        whole = read_data(
            source,
            data.evaluation_split,
            metric=self.model.head.metric,
            normalize=normalize,
            on_disk=data.texts == "disk",
        )
        return select_evaluation(whole, queries=config.queries, documents=config.documents)

    def _warm_start_ids(self) -> Sequence[str]:
        if self.experiment.optimization.warm_start_from == "corpus":
            return document_ids(self.data.documents)
        return sorted({document for _, document in self.dataset.rows})


def _processes_share_cpus() -> bool:
    """Whether a launcher started several processes on a machine without accelerators.

    accelerate has to be told, or it takes each of them for a run of its own.
    """
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.accelerator.is_available()
