"""Trainer: pairs -> trained DualEncoder.

Shapes: B queries a step over all devices, b of this device and round, N documents of all devices.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from index import FaissFit
from retriever import (
    Collator,
    Document,
    InputError,
    RetrievalData,
    TokenBatch,
    embed_documents,
    embed_queries,
    read_data,
)
from retriever.data import document_key
from retriever.distributed import all_gather
from retriever.heads import QuantizerFit
from training.candidates import build_candidates, freeze_towers
from training.card import model_card
from training.checkpoint import Progress, load_checkpoint, save_checkpoint
from training.evaluate import embed_in_shares, evaluate_model, search_exhaustively, select_evaluation
from training.experiment import Experiment, OptimizationConfig, dump_experiment
from training.losses import ScoredBatch
from training.negatives import BatchPlan, PairDataset
from training.optimizer import clip_gradients, forget, learning_rate_factor, parameter_groups
from training.run_folder import checkpoint_to_continue, refuse_finished
from training.scoring import score_batch
from training.tracking import RunLog

__all__ = ["Trainer", "TrainingReport"]

PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingReport:
    """What a run achieved: `best` and `last` are model folders, `metrics` those of the last evaluation."""

    best: Path
    last: Path
    steps: int
    best_step: int
    metrics: dict[str, float]


class Trainer:
    """Trains the model that an experiment describes.

    Args:
        experiment: The whole configuration.
        fit: Gives heads their starting values; FAISS by default.
        progress: Show a bar on the main process.
        start_vectors: Returns the vectors that the starting towers give documents, where they are known already;
            then a frozen tower, or a head that starts at step 0, need not make them.
    """

    def __init__(
        self,
        experiment: Experiment,
        *,
        fit: QuantizerFit | None = None,
        progress: bool = True,
        start_vectors: Callable[[Sequence[Document]], Tensor] | None = None,
    ) -> None:
        self.experiment = experiment
        self.quantizer_fit = fit or FaissFit()
        self.show_progress = progress
        self.start_vectors = start_vectors
        self.folder = Path(experiment.output)
        self.progress = Progress()

    def fit(self, *, resume: bool = False) -> TrainingReport:
        """Train, evaluate, and write `best/` and `last/`.

        Args:
            resume: Continue from the newest checkpoint of the output folder, if there is one.

        Raises:
            InputError: If data, model or output folder are not fit for the run.
        """
        refuse_finished(self.folder, resume)
        self._set_up()
        self._restore(resume)
        log = RunLog(self.folder, self.experiment, self.accelerator, self.progress.step)
        rounds = self._rounds()
        with tqdm(
            desc="train",
            total=self.steps,
            initial=self.progress.step,
            disable=not (self.show_progress and self.accelerator.is_main_process),
        ) as bar:
            for step in range(self.progress.step, self.steps):
                torch.manual_seed(self._seed(step))
                self._start_or_refresh(step)
                row = self._step(step, rounds)
                self.progress.step = step + 1
                if self._due(self.experiment.tracking.every):
                    log.log(step + 1, self._collect(row))
                    bar.set_postfix(loss=f"{row['train/loss']:.3f}", refresh=False)
                if self._due(self.experiment.evaluation.every):
                    log.log(step + 1, self._evaluate())
                if self._due(self.experiment.checkpoint.every):
                    self._save_checkpoint()
                bar.update()
                if self.progress.stopped:
                    break
        report = self._finish()
        log.close()  # ends the process group, so it comes last
        return report

    def _set_up(self) -> None:
        """Load data and model, and prepare them for the devices."""
        experiment, optimization = self.experiment, self.experiment.optimization
        AcceleratorState._reset_state()  # an earlier run of this process may have had another precision
        self.accelerator = Accelerator(
            mixed_precision=PRECISIONS[optimization.precision],
            log_with=experiment.tracking.trackers or None,
            project_dir=str(self.folder),
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        self.processes = self.accelerator.num_processes
        self._check_batch(optimization)
        self.data = read_data(experiment.data.source, experiment.data.train_split)
        self.evaluation = self._read_evaluation()
        torch.manual_seed(experiment.seed)
        self.model = experiment.model.build(experiment.head).to(self.accelerator.device)
        self.loss = experiment.loss.build()
        freeze_towers(self.model, optimization.freeze)
        self.candidates = build_candidates(experiment, self.model, self.data.documents.values(), self._embed)
        self.corpus = self.candidates.corpus
        self._plan_pairs()
        compresses = experiment.head.name != "none"
        experiment.head.check_sample(min(len(self._warm_start_ids()), optimization.warm_start_documents))
        self.head_start = round(optimization.dense_warmup * self.steps) if compresses else self.steps
        optimizer = torch.optim.AdamW(parameter_groups(self.model, optimization), fused=True)
        self.state = nn.ModuleDict({"model": self.model, "loss": self.loss, "candidates": self.candidates})
        self.state.to(self.accelerator.device)
        self.wrapped, self.optimizer = self.accelerator.prepare(self.model, optimizer)
        self._started = time.perf_counter()
        self._pairs = 0

    def _plan_pairs(self) -> None:
        """Decide which pairs each step sees."""
        data, optimization = self.experiment.data, self.experiment.optimization
        if data.labels == "teacher":
            self.data = self._label_by_teacher()
        self.dataset = PairDataset(self.data, data.negatives_per_query)
        del self.dataset.rows[data.max_pairs or len(self.dataset.rows) :]
        self.plan = BatchPlan(
            lengths=[self.dataset.length(row) for row in range(len(self.dataset))],
            batch_size=optimization.batch_size,
            seed=self.experiment.seed,
            bucket_batches=optimization.bucket_batches,
        )
        epochs = math.ceil(optimization.epochs * self.plan.batches_per_epoch)
        self.steps = optimization.steps or max(1, epochs)

    def _label_by_teacher(self) -> RetrievalData:
        """Give every query of the split the document that the towers rank first, in the place of its judgements."""
        texts = [self.data.queries[name] for name in self.data.qrels]
        precision = self.experiment.optimization.precision
        queries = embed_in_shares(
            texts, lambda part: embed_queries(self.model, part, precision=precision), self.accelerator.device
        )
        documents = self._embed(list(self.data.documents.values()))
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

    def _read_evaluation(self) -> RetrievalData:
        config, data = self.experiment.evaluation, self.experiment.data
        source = data.evaluation_source or data.source
        whole = read_data(source, data.evaluation_split)
        return select_evaluation(whole, queries=config.queries, documents=config.documents)

    def _rounds(self) -> Iterator[TokenBatch]:
        """Yield this device's batches: `accumulation` rounds of each remaining step."""
        optimization = self.experiment.optimization
        size = optimization.batch_size // (optimization.accumulation * self.processes)
        offsets = [
            (a * self.processes + self.accelerator.process_index) * size
            for a in range(optimization.accumulation)
        ]
        plan = self.plan.steps(self.progress.step, self.steps, slice(None))
        frozen = optimization.freeze != "none"  # documents are then vectors already
        loader = DataLoader(
            self.dataset,
            batch_sampler=[batch[start : start + size] for batch in plan for start in offsets],
            collate_fn=Collator(
                self.model.tokenize_queries, (lambda _: {}) if frozen else self.model.tokenize_documents
            ),
            generator=torch.Generator(),  # its own, or its start would draw from the step's random numbers
        )
        for batch in loader:
            yield batch.to(self.accelerator.device)

    def _step(self, step: int, rounds: Iterator[TokenBatch]) -> dict[str, float]:
        """Run one optimizer step; return the values to log."""
        optimization = self.experiment.optimization
        self.wrapped.train()
        for tower in (self.model.query_encoder, self.model.document_encoder):
            tower.train(optimization.dropout and any(p.requires_grad for p in tower.parameters()))
        row: dict[str, float] = defaultdict(float)
        factor = learning_rate_factor(step, self.steps, optimization)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        compress = step >= self.head_start
        for number, batch in enumerate(islice(rounds, optimization.accumulation)):
            last = number == optimization.accumulation - 1
            with nullcontext() if last else self.accelerator.no_sync(self.wrapped):
                parts, seen = self._losses(batch, compress)
                loss = torch.stack([self._scale(name) * value for name, value in parts.items()]).sum()
                self.accelerator.backward(loss / optimization.accumulation)
            for name, value in parts.items():
                row[f"train/loss_{name}"] += self._mean(value) / optimization.accumulation
        row["train/loss"] = sum(value for name, value in row.items() if name.startswith("train/loss_"))
        self.accelerator.unscale_gradients()
        row |= clip_gradients(self.model, optimization.max_grad_norm)
        if compress:
            self.model.head.descend(factor, torch.Generator().manual_seed(self._seed(step, rank=0)))
        self.optimizer.step()
        self.optimizer.zero_grad()
        if compress:
            row |= self._care_for_codebooks(step, seen)
        self._pairs += optimization.batch_size
        return {**row, "train/lr": self.optimizer.param_groups[0]["lr"]}

    def _losses(self, batch: TokenBatch, compress: bool) -> tuple[dict[str, Tensor], ScoredBatch]:
        """Return the loss parts of one round, and what they were computed from."""
        with self.accelerator.autocast():
            batch = self.candidates.extend(batch, self.model, compressed=compress)
            known = self.candidates.known_vectors(batch)
            teacher = self.candidates.teach(batch, known)
        vectors = self.wrapped(batch, compress, known)
        scored = score_batch(
            vectors,
            batch,
            metric=self.model.head.metric,
            mode=self.experiment.optimization.cross_device,
            teacher=teacher,
        )
        if compress:
            self.model.head.count(all_gather(vectors.compressed.codes))
        head_losses = {f"head_{name}": value for name, value in vectors.compressed.losses.items()}
        return {**self.loss(scored), **head_losses}, scored

    def _scale(self, name: str) -> int:
        """Return the factor of a loss part whose gradient is averaged over the devices.

        In mode `full` every device has the gradient of the whole loss by its own vectors, and the sum is wanted.
        """
        optimization = self.experiment.optimization
        whole = optimization.cross_device == "full" and optimization.world_scale == "exact"
        return self.processes if whole and not name.startswith("head_") else 1

    def _care_for_codebooks(self, step: int, seen: ScoredBatch) -> dict[str, float]:
        """Measure the codebooks' use and distortion; restart dead codewords."""
        head = self.model.head
        error = (seen.documents - seen.reconstruction).detach().square().sum(1).mean().item()
        row = {"head/distortion": error, **{f"head/{k}": v for k, v in head.usage_statistics().items()}}
        generator = torch.Generator().manual_seed(self._seed(step, rank=0))
        forget(self.optimizer, head.restart_dead_codes(all_gather(seen.documents.detach()), generator))
        return row

    def _start_or_refresh(self, step: int) -> None:
        """Start the head when its time has come; afterwards renew the codes that live negatives are ranked by."""
        every = self.experiment.live_negatives.refresh
        if step == self.head_start:
            self._warm_start()
        elif step > self.head_start and every and (step - self.head_start) % every == 0:
            self.candidates.refresh(self.model, self._corpus_vectors())

    def _corpus_vectors(self) -> Tensor | None:
        """Return the current vectors of the whole corpus, where it is kept."""
        if self.corpus is None:
            return None
        return self._embed(self.corpus.documents) if self.corpus.vectors is None else self.corpus.vectors

    def _warm_start(self) -> None:
        """Give the head its starting values from the current vectors of a sample of documents."""
        optimization = self.experiment.optimization
        ids = self._warm_start_ids()
        generator = torch.Generator().manual_seed(self.experiment.seed)
        chosen = torch.randperm(len(ids), generator=generator).tolist()[: optimization.warm_start_documents]
        documents = [self.data.documents[ids[row]] for row in chosen]
        whole = self._corpus_vectors()
        if self.corpus is None or whole is None:
            vectors = self._embed(documents)
        else:
            vectors = whole[[self.corpus.row[document_key(document.id)] for document in documents]]
        head = self.model.head
        if self.accelerator.is_main_process:
            head.warm_start(vectors, self.quantizer_fit, self.experiment.seed)
        if self.processes > 1:
            for value in head.state_dict().values():
                torch.distributed.broadcast(value, 0)
        self.candidates.start(self.model, whole)

    def _embed(self, documents: Sequence[Document]) -> Tensor:
        """Return the current vectors of documents, on the device; every process embeds a share."""
        if self.start_vectors and self.progress.step == 0:
            return self.start_vectors(documents).to(self.accelerator.device)
        precision = self.experiment.optimization.precision
        return embed_in_shares(
            documents,
            lambda part: embed_documents(self.model, part, precision=precision),
            self.accelerator.device,
        )

    def _warm_start_ids(self) -> list[str]:
        if self.experiment.optimization.warm_start_from == "corpus":
            return sorted(self.data.documents)
        return sorted({document for _, document in self.dataset.rows})

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the current model, and save it if it is the best so far."""
        optimization, config = self.experiment.optimization, self.experiment.evaluation
        self.progress.metrics = evaluate_model(self.model, self.evaluation, precision=optimization.precision)
        name = (
            config.metric
            if config.metric in self.progress.metrics
            else config.metric.replace("compressed", "dense")
        )
        value, progress = self.progress.metrics[name], self.progress
        if (
            self.progress.step >= self.head_start or self.experiment.head.name == "none"
        ):  # no untrained head wins
            if progress.best_metric is None or value > progress.best_metric:
                progress.best_metric, progress.best_step, progress.worse = value, progress.step, 0
                self._save_model("best")
            else:
                progress.worse += 1
                progress.stopped = bool(config.patience) and progress.worse >= config.patience
        return {f"eval/{name}": value for name, value in self.progress.metrics.items()}

    def _finish(self) -> TrainingReport:
        self._save_model("last")
        return TrainingReport(
            best=self.folder / "best",
            last=self.folder / "last",
            steps=self.progress.step,
            best_step=self.progress.best_step,
            metrics=self.progress.metrics,
        )

    def _save_model(self, name: str) -> None:
        if self.accelerator.is_main_process:
            card = model_card(self.folder.name, self.experiment, self.model, self.progress.metrics)
            files = {"experiment.yaml": dump_experiment(self.experiment), "README.md": card}
            self.model.save(
                self.folder / name,
                overwrite=True,
                files=files,
                about={"step": self.progress.step, "metrics": self.progress.metrics},
            )
        self.accelerator.wait_for_everyone()

    def _save_checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler
            self.progress.processes = self.processes
            save_checkpoint(
                self.folder / "checkpoints",
                model=self.state,
                optimizer=self.optimizer,
                progress=self.progress,
                experiment_yaml=dump_experiment(self.experiment),
                scaler=scaler.state_dict() if scaler else None,
                keep=self.experiment.checkpoint.keep,
            )
        self.accelerator.wait_for_everyone()

    def _restore(self, resume: bool) -> None:
        """Continue from the newest checkpoint."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = checkpoint_to_continue(self.folder, self.experiment) if resume else None
        if path is None:
            return
        self.progress, scaler = load_checkpoint(path, model=self.state, optimizer=self.optimizer)
        if self.progress.processes != self.processes:
            raise InputError(
                f"{path} was written by {self.progress.processes} processes and cannot continue exactly on "
                f"{self.processes}. Start as many processes as before."
            )
        if scaler and self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(scaler)

    def _due(self, every: int) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens after this step."""
        return self.progress.step == self.steps or (bool(every) and self.progress.step % every == 0)

    def _mean(self, value: Tensor) -> float:
        """Return the mean over the processes."""
        return float(self.accelerator.reduce(value.detach(), "mean").item())

    def _collect(self, row: dict[str, float]) -> dict[str, float]:
        """Add the speed since the last row."""
        now = time.perf_counter()
        speed = self._pairs / (now - self._started)
        self._started, self._pairs = now, 0
        return {**row, "perf/pairs_per_second": speed}

    def _seed(self, step: int, rank: int | None = None) -> int:
        """Return the seed of a step, of this process unless another rank is given."""
        rank = self.accelerator.process_index if rank is None else rank
        text = f"{self.experiment.seed}/{step}/{rank}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
