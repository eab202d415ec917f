"""Trainer: pairs -> trained DualEncoder.

Shapes: B queries a step over all devices, b of this device and round, N documents of all devices.
"""

from __future__ import annotations

import hashlib
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from index import FaissFit
from retriever import Document, TokenBatch
from retriever.distributed import all_gather
from retriever.heads import QuantizerFit
from training.card import model_card
from training.chunked import ChunkedRound
from training.evaluate import evaluate_model
from training.experiment import Experiment
from training.optimizer import clip_gradients, forget, learning_rate_factor
from training.preemption import Preempted, StopRequest
from training.recipe import dump_experiment
from training.rounds import Round, RoundResult, WholeRound
from training.run import TrainingRun
from training.run_folder import refuse_finished
from training.sharding import average_replicated
from training.tracking import RunLog, check_tracking

__all__ = ["Trainer", "TrainingReport"]


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

    def fit(self, *, resume: bool = False) -> TrainingReport:
        """Train, evaluate, and write `best/` and `last/`.

        Args:
            resume: Continue from the newest checkpoint of the output folder, if there is one.

        Raises:
            InputError: If data, model or output folder are not fit for the run.
            Preempted: If SIGTERM or SIGUSR1 came; the step is finished and a checkpoint written.
        """
        check_tracking(self.experiment.tracking)
        refuse_finished(Path(self.experiment.output), resume)
        with StopRequest() as stop:
            self.run = run = TrainingRun(self.experiment, self.quantizer_fit, self.start_vectors)
            run.restore(resume)
            log = RunLog(run.folder, self.experiment, run.accelerator, run.progress)
            try:
                self._train(log, stop)
            except Preempted:
                log.close()
                raise
            report = self._finish()
            if self.experiment.tracking.log_model:
                log.log_model(report.best, report.metrics)
            log.close()  # ends the process group, so it comes last
        return report

    def _train(self, log: RunLog, stop: StopRequest) -> None:
        """Take the remaining steps."""
        run, config = self.run, self.experiment
        self._evaluate_if_due(log)  # a signal may have left no time for it
        self._started, self._pairs = time.perf_counter(), 0
        self._places = torch.zeros(2, device=run.accelerator.device)
        self._round: Round = (ChunkedRound if self.experiment.optimization.chunk_size else WholeRound)(run)
        rounds = run.rounds()
        with tqdm(
            desc="train",
            total=run.steps,
            initial=run.progress.step,
            disable=not (self.show_progress and run.accelerator.is_main_process),
        ) as bar:
            for step in range(run.progress.step, run.steps):
                if run.progress.stopped:
                    break
                torch.manual_seed(self._seed(step))
                self._start_or_refresh(step)
                row = self._step(step, rounds)
                run.progress.step = step + 1
                if self._due(config.tracking.every):
                    values = self._collect(row)
                    log.log(step + 1, values)
                    bar.set_postfix(loss=f"{values['train/loss']:.3f}", refresh=False)
                if stop.agreed(run.accelerator.device):
                    raise Preempted(step + 1, run.save_checkpoint())
                self._evaluate_if_due(log)
                if self._due(config.checkpoint.every):
                    run.save_checkpoint()
                bar.update()

    def _step(self, step: int, rounds: Iterator[list[TokenBatch]]) -> dict[str, Tensor | float]:
        """Run one optimizer step; return the values to log, as the device has them: none is waited for."""
        run, optimization = self.run, self.experiment.optimization
        run.wrapped.train()
        for tower in (run.model.query_encoder, run.model.document_encoder):
            tower.train(optimization.dropout and any(p.requires_grad for p in tower.parameters()))
        row: dict[str, Tensor | float] = defaultdict(float)
        factor = learning_rate_factor(step, run.steps, optimization)
        for group in run.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        compress = step >= run.head_start
        for number, chunks in enumerate(islice(rounds, optimization.accumulation)):
            self._count_places(chunks)
            seen = self._round(chunks, compress=compress, last=number == optimization.accumulation - 1)
            for name, value in seen.parts.items():
                row[f"train/loss_{name}"] += value / optimization.accumulation
        if run.sharded:
            average_replicated(run.state.children())
        run.accelerator.unscale_gradients()
        row |= clip_gradients(run.model, optimization.max_grad_norm)
        if compress:
            run.model.head.descend(factor, torch.Generator().manual_seed(self._seed(step, rank=0)))
        run.optimizer.step()
        run.optimizer.zero_grad()
        if compress:
            row |= self._care_for_codebooks(step, seen)
        self._pairs += optimization.batch_size
        return {**row, "train/lr": optimization.lr * factor, "train/lr_head": optimization.head_lr * factor}

    def _care_for_codebooks(self, step: int, seen: RoundResult) -> dict[str, Tensor | float]:
        """Measure the codebooks' use and distortion; restart dead codewords."""
        run, head = self.run, self.run.model.head
        error = (seen.originals - seen.reconstruction).square().sum(1).mean()
        row: dict[str, Tensor | float] = {"head/distortion": error}
        if self._due(self.experiment.tracking.every, step + 1):
            row |= {f"head/{name}": value for name, value in head.usage_statistics().items()}
        generator = torch.Generator().manual_seed(self._seed(step, rank=0))
        forget(run.optimizer, head.restart_dead_codes(all_gather(seen.originals), generator))
        return row

    def _start_or_refresh(self, step: int) -> None:
        """Start the head when its time has come; afterwards renew the codes that live negatives are ranked by."""
        run, every = self.run, self.experiment.live_negatives.refresh
        if step == run.head_start:
            run.warm_start()
        elif step > run.head_start and every and (step - run.head_start) % every == 0:
            run.candidates.refresh(run.model, run.embed)

    def _evaluate_if_due(self, log: RunLog) -> None:
        progress = self.run.progress
        if progress.step > progress.evaluated and self._due(self.experiment.evaluation.every):
            progress.evaluated = progress.step
            log.log(progress.step, self._evaluate())

    def _evaluate(self) -> dict[str, float]:
        """Evaluate the current model, and save it if it is the best so far."""
        run, config = self.run, self.experiment.evaluation
        optimization, progress = self.experiment.optimization, run.progress
        progress.metrics = evaluate_model(run.model, run.evaluation, precision=optimization.precision)
        name = config.metric
        if name not in progress.metrics:
            name = name.replace("compressed", "dense")
        value = progress.metrics[name]
        if progress.step >= run.head_start or self.experiment.head.name == "none":  # no untrained head wins
            if progress.best_metric is None or value > progress.best_metric:
                progress.best_metric, progress.best_step, progress.worse = value, progress.step, 0
                self._save_model("best")
            else:
                progress.worse += 1
                progress.stopped = bool(config.patience) and progress.worse >= config.patience
        return {f"eval/{name}": value for name, value in progress.metrics.items()}

    def _finish(self) -> TrainingReport:
        run = self.run
        self._save_model("last")
        return TrainingReport(
            best=run.folder / "best",
            last=run.folder / "last",
            steps=run.progress.step,
            best_step=run.progress.best_step,
            metrics=run.progress.metrics,
        )

    def _save_model(self, name: str) -> None:
        run = self.run
        weights = run.whole_weights()
        if run.accelerator.is_main_process:
            card = model_card(run.folder.name, self.experiment, run.model, run.progress.metrics)
            files = {"experiment.yaml": dump_experiment(self.experiment), "README.md": card}
            run.model.save(
                run.folder / name,
                overwrite=True,
                files=files,
                about={"step": run.progress.step, "metrics": run.progress.metrics},
                weights=weights,
            )
        run.accelerator.wait_for_everyone()

    def _due(self, every: int, step: int | None = None) -> bool:
        """Whether something that happens each `every` steps, and at the end, happens after this step."""
        step = self.run.progress.step if step is None else step
        return step == self.run.steps or (bool(every) and step % every == 0)

    def _count_places(self, chunks: Sequence[TokenBatch]) -> None:
        """Count the places of token matrices, and those that hold a token."""
        for tokens in (tokens for chunk in chunks for tokens in (chunk.queries, chunk.documents)):
            if "attention_mask" in tokens:
                mask = tokens["attention_mask"]
                self._places += torch.stack([mask.sum(), mask.new_tensor(mask.numel())])

    def _collect(self, row: dict[str, Tensor | float]) -> dict[str, float]:
        """Return the numbers of a row, means over the processes, with loss, speed and padding since the last row."""
        on_device = {name: value for name, value in row.items() if isinstance(value, Tensor)}
        means = self.run.accelerator.reduce(torch.stack(list(on_device.values())), "mean").tolist()
        values = {
            name: float(value) for name, value in {**row, **dict(zip(on_device, means, strict=True))}.items()
        }
        values["train/loss"] = sum(value for name, value in values.items() if name.startswith("train/loss_"))
        now = time.perf_counter()
        values["perf/pairs_per_second"] = self._pairs / (now - self._started)
        used, places = self.run.accelerator.reduce(self._places, "sum").tolist()
        if places:
            values["perf/padding_share"] = 1 - used / places
        self._started, self._pairs = now, 0
        self._places.zero_()
        return values

    def _seed(self, step: int, rank: int | None = None) -> int:
        """Return the seed of a step, of this process unless another rank is given."""
        rank = self.run.accelerator.process_index if rank is None else rank
        text = f"{self.experiment.seed}/{step}/{rank}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")
