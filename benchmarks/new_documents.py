"""Search among documents that came after the fit, alone: the blind runs of `quality.py` on its judged documents.

In the blind reading of `quality.py` nobody saw the judged documents, but most of the others that are searched were
seen, and a quantizer describes those better. Who ranks documents of one kind before those of the other gains or loses
by that, whatever the codes are worth. Here the corpus is the judged documents alone, which are all new; systems and
runs are those of `quality.py` (same options and --out), and nothing is trained or fitted that is there.

  dense control        its vectors, exact
  FAISS ...            fitted without the judged documents, which are then all that is added; --systems names others
  endex                the trained recipe, exported with these documents alone

`kept` is nDCG@10 as a share of the control's in this corpus; `gain` that of `endex` over the best of FAISS's rows that
are here, with its 95 % interval and two-sided p (paired by query, normal).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import common
import numpy as np
from methods import Result, innermost
from quality import DENSE, ENDEX, QualityStudy, parse, seeded

from index._faiss import load_faiss
from training import evaluate_index

READING = "blind"
RIVALS = ("FAISS OPQ", "FAISS RQ, reduced, lists, wide beam", "FAISS RQ, lists, wide beam")
SHOWN = ("system", "bytes", "ndcg@10", "mrr@10", "recall@10", "kept", "gain", "p")


def main() -> None:
    options = parse(__doc__)
    rows: list[Result] = []
    for source in options.data:
        for seed in options.seeds:
            found = NewDocuments(source, seeded(options, seed)).table(READING)
            rows += [{**row, "data": source.name, "seed": seed} for row in found]
    for row in rows:
        row.pop("per_query", None)
    common.write_result(options.json, options, rows)


class NewDocuments(QualityStudy):
    """What `QualityStudy` has trained, on its judged documents."""

    def table(self, reading: str) -> list[Result]:
        """Return and print the rows."""
        control = self.out / "control" / "run" / "last"
        if not control.is_dir():
            raise SystemExit(f"{control} is not there. Run benchmarks/quality.py with these options first.")
        vectors = self._vectors(control)
        seen = np.array(self._known(reading))
        x, q = vectors["documents"].numpy(), vectors["queries"].numpy()
        whole = self.data
        new = {name: document for name, document in whole.documents.items() if name in self.judged}
        flat = load_faiss().IndexFlatIP(x.shape[1])
        flat.add(x[~seen])
        built: list[tuple[str, int, Any]] = [(DENSE, 0, flat)]
        for size in self.options.bytes:
            for name in self.options.systems or RIVALS:
                fitted = load_faiss().clone_index(
                    self._fitted(self._factories(size, x.shape[1])[name], x, reading)
                )
                fitted.reset()
                fitted.add(x[~seen])
                if ", lists" in name:
                    inner = load_faiss().extract_index_ivf(fitted)
                    inner.nprobe = inner.nlist
                built.append((name, size, fitted))
        self.data = replace(whole, documents=new)  # whose ids are the rows of what is built
        rows = [
            {"system": name, "bytes": size, **self._measured(self._run(index, q))}
            for name, size, index in built
        ]
        rows += [self._exported(size, reading) for size in self.options.bytes]
        self._compare(rows)
        title = f"{self.name}, new documents alone: {len(whole.qrels):,} queries, {len(new):,} documents"
        common.print_table(title, [{name: row.get(name) for name in SHOWN} for row in rows])
        self.data = whole
        return rows

    def _exported(self, size: int, reading: str) -> Result:
        """Return the row of the trained recipe."""
        folder = self.out / reading / f"{ENDEX}-{size}"
        model, head = folder / "run" / "last", self._recipe(ENDEX).head
        if not model.is_dir():
            raise SystemExit(f"{model} is not there. Run benchmarks/quality.py with these options first.")
        _, searcher = self._export(model, head, folder / "index-new")
        if hasattr(innermost(head), "num_lists"):
            searcher.probe(self.lists)
        metrics, run = evaluate_index(searcher, self.data, precision=self.options.precision)
        return {"system": ENDEX, "bytes": size, **metrics, "per_query": self._per_query(run)}


if __name__ == "__main__":
    main()
