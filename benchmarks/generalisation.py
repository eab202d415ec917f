"""How much of a quantizer's quality is memory of the documents that it was fitted on.

For each data folder, on the vectors of `quality.py`'s dense control (same options, same --out): FAISS's components,
lists and residual codes are fitted blind on a share of the visible documents, on all of them, and on all of them with
several times as many further documents of the set, which are not in the index. Then all is indexed and searched.

  fitted     documents that the codes were fitted on
  error seen, error unseen   mean squared error of the reconstruction of the visible documents that were among them, and
             of the judged ones, which never are; vectors have length 1
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import numpy as np
import torch
from methods import Result
from quality import QualityStudy, additive_factory, parse_study, quality_parser, seeded

from index._faiss import load_faiss
from retriever import DualEncoder, embed_documents, read_data
from training import measure

SHARES = (0.25, 0.5, 1.0)
FURTHER = 4  # times the visible documents


def main() -> None:
    parser = quality_parser(__doc__, out="runs/quality")
    parser.set_defaults(readings=("blind",))
    options = parse_study(parser)
    rows: list[Result] = []
    for source in options.data:
        for seed in options.seeds:
            study = GeneralisationStudy(source, seeded(options, seed))
            for size in options.bytes:
                found = [{**row, "seed": seed} for row in study.rows(size)]
                common.print_table(f"{study.name}, blind, {size} bytes, seed {seed}", found)
                rows += found
    common.write_result(options.json, options, rows)


class GeneralisationStudy(QualityStudy):
    """One quantizer on one data set, fitted on more and more documents."""

    def __init__(self, source: Path, options: argparse.Namespace) -> None:
        super().__init__(source, options)
        start = self._fit(self._dense("start", options.encoder))
        self.control = self._fit(self._dense("control", str(start / "encoder")))
        self.vectors = {name: value.numpy() for name, value in self._vectors(self.control).items()}
        self.known = np.array(self._known("blind"))
        self.further = self._further()

    def rows(self, size: int) -> list[Result]:
        """Return a row for every number of documents that the codes are fitted on."""
        order = np.random.default_rng(self.options.seed).permutation(np.flatnonzero(self.known))
        counts = [count for share in SHARES if (count := int(share * len(order))) >= self.lists]
        samples = [(order[:count], None) for count in counts] + [(order, self.further)]
        return [self._row(size, chosen, further) for chosen, further in samples]

    def _row(self, size: int, chosen: np.ndarray, further: np.ndarray | None) -> Result:
        x = self.vectors["documents"]
        built = common.faiss_quantizer(
            x.shape[1], additive_factory(size, self.lists), "l2", self.options.seed
        )
        sample = x[chosen] if further is None else np.concatenate([x[chosen], further])
        load_faiss().extract_index_ivf(built).cp.max_points_per_centroid = len(sample)
        built.train(sample)
        built.add(x)
        load_faiss().extract_index_ivf(built).nprobe = self.lists
        error = ((built.sa_decode(built.sa_encode(x)) - x) ** 2).sum(1)
        found = measure(self.data.qrels, self._run(built, self.vectors["queries"]))
        return {
            "data": self.name,
            "bytes": size,
            "fitted": len(sample),
            "error seen": float(error[chosen].mean()),
            "error unseen": float(error[~self.known].mean()),
            "ndcg@10": found["ndcg@10"],
        }

    def _further(self) -> np.ndarray:
        """Return vectors of documents that are neither in the index nor judged in any split."""
        splits = [read_data(self.source, split) for split in ("train", "dev", "test")]
        judged = {document for split in splits[1:] for row in split.qrels.values() for document in row}
        others = [
            document
            for name, document in splits[0].documents.items()
            if name not in self.data.documents and name not in judged
        ]
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(self.options.seed))
        chosen = [others[row] for row in order.tolist()[: FURTHER * int(self.known.sum())]]
        model = DualEncoder.load(self.control)
        return embed_documents(model, chosen, precision=self.options.precision).numpy()


if __name__ == "__main__":
    main()
