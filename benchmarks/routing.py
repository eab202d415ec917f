"""Do learned inverted lists find a query's list better than k-means, at equal work?

Document vectors stay; only the J centroids are trained, from k-means on, by the dense ranking of the training queries:

  documents  Distill-VQ's term: ListNet between the dense scores of all documents and those of their lists' centroids.
  lists      the same probabilities summed by list, against a softmax over the J centroids (ours).

each with lists that stay (`frozen`) or follow the centroids (`live`). `recall` is the share of judged documents whose
list is among the `nprobe` best of the query; `scanned` is how many documents those lists hold, mean over queries. Lists
that grow find more and cost more, so the last column compares at equal work: recall less that of k-means at as many
scanned documents (linear in the logarithm between its own points). Blind: judged documents are in no training, and
are only put into lists.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from index._faiss import load_faiss
from retriever import DualEncoder, RetrievalData, embed_documents, embed_queries, read_data
from retriever.scores import score_matrix
from training.evaluate import select_evaluation

PROBES = (1, 2, 4, 8, 16)


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--model", type=Path, required=True, help="model folder whose towers are used")
    parser.add_argument("--data", type=Path, required=True, help="folder in the BEIR layout")
    parser.add_argument("--lists", type=int, default=128, help="J")
    parser.add_argument("--steps", type=int, default=256, help="training steps")
    parser.add_argument("--batch_size", type=int, default=32, help="queries a step")
    parser.add_argument("--documents", type=int, default=8000, help="documents kept, 0 for all")
    parser.add_argument("--queries", type=int, default=1500, help="judged queries kept, 0 for all")
    parser.add_argument("--seeds", type=int, default=3, help="seeds of k-means and of the batches")
    options = parser.parse_args()
    if options.quick:
        options.steps, options.documents, options.queries, options.seeds = 8, 1000, 100, 1
    study = Study(options)
    rows = []
    for term in ("k-means", "documents", "lists"):
        for assignment in ("frozen",) if term == "k-means" else ("frozen", "live"):
            for lr, temperature in ((0.0, 1.0),) if term == "k-means" else ((5e-4, 0.05), (2e-3, 0.05)):
                runs = [study.run(term, assignment, lr, temperature, seed) for seed in range(options.seeds)]
                named = {"term": term, "assignment": assignment, "lr": lr, "temperature": temperature}
                rows.append({**named, **{name: float(np.mean([r[name] for r in runs])) for name in runs[0]}})
    common.print_table(f"{options.data.name}: {options.lists} lists, {options.seeds} seeds", rows)
    common.write_result(options.json, options, rows)


class Study:
    """The vectors of one data set, and the lists trained on them."""

    def __init__(self, options: Any) -> None:
        self.options = options
        data = select_evaluation(
            read_data(str(options.data), "test"), queries=options.queries, documents=options.documents
        )
        self.row = {name: row for row, name in enumerate(data.documents)}
        self.judged = [[self.row[name] for name in row] for row in data.qrels.values()]
        known = torch.ones(len(self.row), dtype=torch.bool)
        known[[row for rows in self.judged for row in rows]] = False
        self.known = known
        model = DualEncoder.load(options.model)
        self.documents = embed_documents(model, list(data.documents.values()), precision="bf16")
        self.queries = embed_queries(model, [data.queries[name] for name in data.qrels], precision="bf16")
        self.training = embed_queries(model, self._training_texts(options.data), precision="bf16")
        self.base: dict[int, dict[str, float]] = {}

    def _training_texts(self, source: Path) -> list[str]:
        """Return the training queries that have a relevant document among those that may be seen."""
        train: RetrievalData = read_data(str(source), "train")
        rows = {name: row for name, row in self.row.items() if self.known[row]}
        return [train.queries[name] for name, found in train.qrels.items() if any(d in rows for d in found)]

    def run(self, term: str, assignment: str, lr: float, temperature: float, seed: int) -> dict[str, float]:
        """Return recall and scanned documents by nprobe, and the gain over k-means at equal work."""
        faiss, x = load_faiss(), self.documents[self.known]
        kmeans = faiss.Kmeans(x.shape[1], self.options.lists, niter=25, seed=seed, min_points_per_centroid=1)
        kmeans.train(x.numpy())
        centroids = torch.from_numpy(kmeans.centroids.copy()).requires_grad_()
        if term != "k-means":
            self._train(centroids, term, assignment == "live", lr, temperature, seed)
        start = torch.from_numpy(kmeans.centroids)
        lists = self._nearest(centroids.detach() if assignment == "live" else start)
        found = self._probe(centroids.detach(), lists)
        if term == "k-means":
            self.base[seed] = found
        return {**found, "gain at equal work": self._gain(found, self.base[seed])}

    def _train(
        self, centroids: Tensor, term: str, live: bool, lr: float, temperature: float, seed: int
    ) -> None:
        """Move the centroids."""
        optimizer = torch.optim.AdamW([centroids], lr=lr, weight_decay=0)
        generator = torch.Generator().manual_seed(seed)
        x, lists = self.documents[self.known], self._nearest(centroids.detach())[self.known]
        for step in range(self.options.steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / self.options.steps)
            chosen = torch.randint(len(self.training), (self.options.batch_size,), generator=generator)
            q = self.training[chosen]
            if live and step % 8 == 0:
                lists = self._nearest(centroids.detach())[self.known]
            teacher = (score_matrix(q, x, "l2") / temperature).softmax(1)
            scores = score_matrix(q, centroids, "l2") / temperature
            if term == "lists":
                teacher = torch.zeros_like(scores).index_add_(1, lists, teacher)
            else:
                scores = scores[:, lists]
            loss = -(teacher * F.log_softmax(scores, 1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    def _nearest(self, centroids: Tensor) -> Tensor:
        return score_matrix(self.documents, centroids, "l2").argmax(1)

    def _probe(self, centroids: Tensor, lists: Tensor) -> dict[str, float]:
        best = score_matrix(self.queries, centroids, "l2").topk(PROBES[-1]).indices  # (B, 16)
        size = lists.bincount(minlength=len(centroids))
        found = {}
        for nprobe in PROBES:
            probed = [set(row[:nprobe].tolist()) for row in best]
            shares = [
                np.mean([int(lists[row]) in near for row in rows])
                for near, rows in zip(probed, self.judged, strict=True)
            ]
            found[f"recall {nprobe}"] = float(np.mean(shares))
            found[f"scanned {nprobe}"] = float(size[best[:, :nprobe]].sum(1).float().mean())
        return found

    @staticmethod
    def _gain(found: dict[str, float], base: dict[str, float]) -> float:
        """Return recall at nprobe 1 less that of k-means at as many scanned documents."""
        scanned = np.log([base[f"scanned {nprobe}"] for nprobe in PROBES])
        expected = np.interp(
            np.log(found["scanned 1"]), scanned, [base[f"recall {nprobe}"] for nprobe in PROBES]
        )
        return found["recall 1"] - float(expected)


if __name__ == "__main__":
    main()
