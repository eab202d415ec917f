"""Experiment: the root of the typed configuration tree; `training/recipe.py` reads and writes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from retriever import DualEncoderConfig, InputError, Precision
from retriever.heads import HeadConfig
from training.losses import LossConfig
from training.scoring import CrossDevice

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "Experiment",
    "LiveNegativesConfig",
    "OptimizationConfig",
    "TrackingConfig",
]

Schedule = Literal["linear", "cosine", "quarter_cosine", "constant"]
Labels = Literal["judged", "teacher", "pseudo"]


def _require(condition: bool, field_name: str, value: object, rule: str) -> None:
    if not condition:
        raise InputError(f"{field_name} must be {rule}, got {value!r}.")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """A further set of pairs to train on.

    Attributes:
        source: As `data.source`.
        train_split: Split whose judgements give the training pairs.
        weight: How often its pairs are seen in an epoch: 1 once, 0.5 half of them, 2 twice.
        max_pairs: Use only the first pairs; all by default.
    """

    source: str
    train_split: str = "train"
    weight: float = 1.0
    max_pairs: int | None = None

    def __post_init__(self) -> None:
        _require(0 < self.weight < float("inf"), "data.mixed_with.weight", self.weight, "positive")
        _require(
            self.max_pairs is None or self.max_pairs > 0,
            "data.mixed_with.max_pairs",
            self.max_pairs,
            "positive",
        )


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Training and evaluation texts, or vectors.

    Attributes:
        source: Folder in the BEIR layout, or name of a Hub data set; with model.encoder vectors a vector file, or a
            folder with base.* and, if it has them, learn.*, query.* and groundtruth.*.
        train_split: Split whose judgements give the training pairs; "train" of vectors are learn.*, else base.*.
        negatives_per_query: Given negatives of a query in each batch (from negatives.jsonl, else random documents).
        max_pairs: Use only the first pairs; all by default.
        weight: With `mixed_with`: how often the pairs of `source` are seen in an epoch.
        mixed_with: Further sets. A batch is from one set, and so are its in-batch negatives; sets take turns at random.
        texts: "memory", or "disk" for a corpus that is larger: of .jsonl files the line is read when it is wanted, of
            Hub data sets the row of the Arrow table.
        labels: "judged" takes the split's judgements; "teacher" only its queries, each with the document that the
            starting towers rank first (Distill-VQ without labels); "pseudo" no queries at all: titles and first
            sentences of the documents take their place, in the evaluation too unless it has a source of its own.
        evaluation_source: Folder or data set of the evaluation; by default `source`.
        evaluation_split: Split of the evaluation during training.
    """

    source: str
    train_split: str = "train"
    negatives_per_query: int = 0
    max_pairs: int | None = None
    weight: float = 1.0
    mixed_with: list[SourceConfig] = field(default_factory=list)
    texts: Literal["memory", "disk"] = "memory"
    labels: Labels = "judged"
    evaluation_source: str | None = None
    evaluation_split: str = "dev"

    def __post_init__(self) -> None:
        _require(
            self.negatives_per_query >= 0, "data.negatives_per_query", self.negatives_per_query, "0 or more"
        )
        _require(self.labels in get_args(Labels), "data.labels", self.labels, "judged, teacher or pseudo")
        _require(self.max_pairs is None or self.max_pairs > 0, "data.max_pairs", self.max_pairs, "positive")
        _require(0 < self.weight < float("inf"), "data.weight", self.weight, "positive")
        _require(self.texts in ("memory", "disk"), "data.texts", self.texts, "memory or disk")
        if self.mixed_with and self.labels != "judged":
            raise InputError(f"data.labels {self.labels} takes one set. Leave out data.mixed_with.")

    @property
    def sets(self) -> list[SourceConfig]:
        """All sets of training pairs."""
        own = SourceConfig(
            source=self.source, train_split=self.train_split, weight=self.weight, max_pairs=self.max_pairs
        )
        return [own, *self.mixed_with]


@dataclass(frozen=True, kw_only=True)
class LiveNegativesConfig:
    """Documents that rank high for a query at this moment of the training, as further negatives of the batch.

    Attributes:
        per_query: Such documents a query; 0 for none.
        depth: They are drawn from so many best; all of them if `per_query` is as large.
        by: Ranked by "compressed" scores (JPQ, RepCONC), from the head's start on; or by "dense" ones, which needs a
            frozen document tower (the teacher's best, Distill-VQ).
        refresh: Steps after which the codes they are ranked by are made anew, all of them; 0 only at the head's start.
            Documents that a frozen tower encodes are not encoded again, others are. A document of a batch gets its
            new code in every case.
        margin: Leave out documents that score higher than the query's positive less this; they may be relevant,
            though nobody has said so.
        max_relative: Leave out documents that score higher than this share of the positive's score (NV-Retriever:
            0.95).
    """

    per_query: int = 0
    depth: int = 200
    by: Literal["compressed", "dense"] = "compressed"
    refresh: int = 0
    margin: float | None = None
    max_relative: float | None = None

    def __post_init__(self) -> None:
        _require(self.per_query >= 0, "live_negatives.per_query", self.per_query, "0 or more")
        _require(
            self.depth >= max(1, self.per_query), "live_negatives.depth", self.depth, "per_query or more"
        )
        _require(self.by in ("compressed", "dense"), "live_negatives.by", self.by, "compressed or dense")
        _require(self.refresh >= 0, "live_negatives.refresh", self.refresh, "0 or more")
        share = self.max_relative
        _require(
            share is None or 0 < share <= 1, "live_negatives.max_relative", share, "above 0 and at most 1"
        )


@dataclass(frozen=True, kw_only=True)
class OptimizationConfig:
    """Steps, batches, learning rates, arithmetic.

    Attributes:
        steps: Optimizer steps; by default as many as `epochs` need.
        epochs: Passes over the training pairs, if `steps` is not given.
        batch_size: Queries a step over all devices and accumulation rounds.
        accumulation: Rounds of forward and backward a step; negatives are shared within a round.
        chunk_size: Queries, with their documents, that a device encodes at a time; 0 for all of a round. Fewer take
            less memory for a third more work, and give the same gradients: negatives are still those of the round.
        lr: Peak learning rate of the towers.
        head_lr: Peak learning rate of the head.
        weight_decay: AdamW's weight decay on the towers' matrices.
        warmup: Share of the steps in which the learning rates rise linearly.
        schedule: Fall of the learning rates after the warm-up: "linear", "cosine" or "quarter_cosine" (slow at first,
            QINCo2) to 0, or "constant".
        max_grad_norm: Gradients are clipped to this norm, towers and head apart.
        precision: Arithmetic of the towers; heads and losses are always float32.
        dropout: Dropout of the towers as their models have it; off is faster, and steadier on few pairs.
        freeze: Towers that do not train: "none"; "documents", whose vectors are then computed once (JPQ, Distill-VQ;
            needs model.tie false); or "both", which leaves the head.
        cross_device: Documents of other devices as negatives: "rows" with exact gradients; "full" the same as MoPQ
            published it, at as many times the work as devices; "detached" without gradients; "in_batch" none.
        world_scale: "exact" makes the gradients of "full" those of one device with the whole batch; "ddp_mean" leaves
            them divided by the number of devices, as MoPQ's release.
        dense_warmup: Share of the steps before the head's warm start, in which the towers train uncompressed.
        warm_start_documents: Documents whose current vectors give the head its starting values.
        warm_start_from: Which documents those are: any of the "corpus" (unlabelled), or only those of training "pairs".
        bucket_batches: Batches sorted together by length; 1 leaves batches random.
    """

    steps: int | None = None
    epochs: float = 1.0
    batch_size: int = 64
    accumulation: int = 1
    chunk_size: int = 0
    lr: float = 5e-5
    head_lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    schedule: Schedule = "linear"
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    dropout: bool = True
    freeze: Literal["none", "documents", "both"] = "none"
    cross_device: CrossDevice = "rows"
    world_scale: Literal["exact", "ddp_mean"] = "exact"
    dense_warmup: float = 0.3
    warm_start_documents: int = 65_536
    warm_start_from: Literal["corpus", "pairs"] = "corpus"
    bucket_batches: int = 16

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "bucket_batches", "warm_start_documents"):
            _require(getattr(self, name) >= 1, f"optimization.{name}", getattr(self, name), "at least 1")
        for name in ("lr", "head_lr", "max_grad_norm", "epochs"):
            _require(
                0 < getattr(self, name) < float("inf"),
                f"optimization.{name}",
                getattr(self, name),
                "positive",
            )
        for name in ("warmup", "dense_warmup"):
            _require(
                0 <= getattr(self, name) <= 1, f"optimization.{name}", getattr(self, name), "between 0 and 1"
            )
        for name in ("weight_decay", "chunk_size"):
            _require(getattr(self, name) >= 0, f"optimization.{name}", getattr(self, name), "0 or more")
        _require(self.steps is None or self.steps >= 1, "optimization.steps", self.steps, "at least 1")
        _require(
            self.schedule in get_args(Schedule),
            "optimization.schedule",
            self.schedule,
            f"one of {get_args(Schedule)}",
        )
        _require(
            self.precision in get_args(Precision),
            "optimization.precision",
            self.precision,
            f"one of {get_args(Precision)}",
        )
        for name, choices in (
            ("freeze", ("none", "documents", "both")),
            ("cross_device", get_args(CrossDevice)),
            ("world_scale", ("exact", "ddp_mean")),
        ):
            _require(
                getattr(self, name) in choices,
                f"optimization.{name}",
                getattr(self, name),
                f"one of {choices}",
            )
        if self.batch_size % self.accumulation:
            raise InputError(
                f"optimization.batch_size must be a multiple of accumulation, got {self.batch_size} and "
                f"{self.accumulation}."
            )


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig:
    """Evaluation while training, dense and through the codes.

    Attributes:
        every: Steps between evaluations; 0 only at the end.
        queries: Queries used, 0 for all.
        documents: Documents searched, 0 for all; all relevant ones and others chosen by hash.
        metric: The metric that names the best model: "compressed/" or "dense/" and a measure.
        patience: Stop after this many evaluations without a better metric; 0 never.
    """

    every: int = 0
    queries: int = 500
    documents: int = 10_000
    metric: str = "compressed/ndcg@10"
    patience: int = 0

    def __post_init__(self) -> None:
        for name in ("every", "queries", "documents", "patience"):
            _require(getattr(self, name) >= 0, f"evaluation.{name}", getattr(self, name), "0 or more")
        kind, _, measure = self.metric.partition("/")
        known = ("ndcg@10", "mrr@10", "recall@1", "recall@10", "recall@100")
        if kind not in ("compressed", "dense") or measure not in known:
            raise InputError(
                f"evaluation.metric must be compressed/ or dense/ and one of {', '.join(known)}, got {self.metric!r}."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoints for resuming.

    Attributes:
        every: Steps between checkpoints; 0 only at the end.
        keep: Checkpoints kept.
    """

    every: int = 500
    keep: int = 2

    def __post_init__(self) -> None:
        _require(self.every >= 0, "checkpoint.every", self.every, "0 or more")
        _require(self.keep >= 1, "checkpoint.keep", self.keep, "at least 1")


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where metrics go beside metrics.jsonl.

    Attributes:
        trackers: Trackers that accelerate knows: wandb, tensorboard, trackio ... (WANDB_MODE=offline works).
        project: Project name at the tracker.
        name: Name of the run; by default the output folder's.
        tags: Tags of the run.
        every: Steps between two rows of metrics.
        log_model: Send the best model to wandb as an artifact when the run ends.
    """

    trackers: list[str] = field(default_factory=list)
    project: str = "endex"
    name: str | None = None
    tags: list[str] = field(default_factory=list)
    every: int = 10
    log_model: bool = False

    def __post_init__(self) -> None:
        _require(self.every >= 1, "tracking.every", self.every, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines a trained model.

    Attributes:
        output: Folder of the run: metrics.jsonl, checkpoints/, best/, last/.
        model: The towers.
        head: The compression head.
        loss: The retrieval loss.
        data: Training and evaluation texts.
        live_negatives: Negatives found by the model in training.
        optimization: Steps, batches, learning rates, arithmetic.
        evaluation: Evaluation while training.
        checkpoint: Checkpoints for resuming.
        tracking: Where metrics go.
        seed: Seed of everything random.
    """

    output: str
    model: DualEncoderConfig
    head: HeadConfig
    loss: LossConfig
    data: DataConfig
    live_negatives: LiveNegativesConfig = field(default_factory=LiveNegativesConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        self.loss.check(self.head)
        freeze = self.optimization.freeze
        if freeze == "documents" and self.model.tie and self.model.document_encoder is None:
            raise InputError(
                "optimization.freeze documents needs towers of their own: tied towers share their weights. "
                "Set model.tie false."
            )
        only_head = "model.encoder vectors" if self.model.takes_vectors else ""
        only_head = "optimization.freeze both" if freeze == "both" else only_head
        if only_head and self.head.name == "none":
            raise InputError(f"{only_head} with the head none leaves nothing to train. Choose another head.")
        if only_head and self.optimization.dense_warmup:
            raise InputError(
                f"{only_head} leaves only the head to train, so optimization.dense_warmup must be 0, got "
                f"{self.optimization.dense_warmup}."
            )
        if self.model.dtype != "float32" and self.model.lora is None and freeze != "both":
            raise InputError(
                f"model.dtype {self.model.dtype} rounds away the small steps of weights that train. Set model.lora, "
                "optimization.freeze both, or leave it float32: optimization.precision bf16 computes in bfloat16 and "
                "keeps float32 weights."
            )
        if self.loss.needs_head and self.optimization.dense_warmup:
            raise InputError(
                f"the loss {self.loss.name} without labels has nothing to teach before the head's start. Start from "
                f"trained towers with optimization.dense_warmup 0, got {self.optimization.dense_warmup}."
            )
        if self.loss.needs_scores and not self.data.negatives_per_query:
            raise InputError(
                "loss.teacher given compares a query's positive with its given negatives. Set "
                "data.negatives_per_query to at least 1."
            )
        if self.live_negatives.per_query:
            if self.live_negatives.by == "dense" and freeze == "none":
                raise InputError(
                    "live_negatives.by dense needs a frozen document tower. Set optimization.freeze documents, or "
                    "live_negatives.by compressed."
                )
            if self.live_negatives.by == "compressed" and self.head.name == "none":
                raise InputError("live_negatives.by compressed needs a head that compresses, got none.")
