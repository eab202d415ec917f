"""The model card, README.md of a model folder, with Hugging Face metadata."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCardData

from retriever import DualEncoder, __version__
from training.experiment import Experiment

__all__ = ["model_card"]

BODY = """
# {name}

A two-tower retriever trained together with its compression by [Endex](https://pypi.org/project/endex/) {version}.

| | |
|---|---|
| started from | `{base}` |
| data | `{data}` |
| head | `{head}`, {code_size} bytes a document instead of {dense_size} |
| towers | {towers}, {dim} dimensions |

{table}

```bash
endex export THIS_FOLDER {corpus} --out INDEX     # {inputs} -> codes -> FAISS, nothing is trained
endex search INDEX {query}
```

{towers_are}; `head/` holds the codebooks. `experiment.yaml` is the
complete configuration.
"""

TOWERS = {
    "texts": "The folders of the towers are sentence-transformers models",
    "vectors": "`encoder/` holds what centres and scales a vector",
}


def model_card(name: str, experiment: Experiment, model: DualEncoder, metrics: dict[str, float]) -> str:
    """Return the text of the card; `metrics` are named `dense/...` and `compressed/...`."""
    results = [
        EvalResult(
            task_type="text-retrieval",
            dataset_type=experiment.data.evaluation_source or experiment.data.source,
            dataset_name=experiment.data.evaluation_source or experiment.data.source,
            dataset_split=experiment.data.evaluation_split,
            metric_type=metric,
            metric_value=round(value, 4),
        )
        for metric, value in metrics.items()
    ]
    data = ModelCardData(
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=["endex", "dense-retrieval", "product-quantization", "faiss"],
        base_model=None
        if model.takes_vectors or ":" in experiment.model.encoder
        else experiment.model.encoder,
        model_name=name,
        eval_results=results or None,
    )
    body = BODY.format(
        name=name,
        version=__version__,
        base=experiment.model.encoder,
        data=experiment.data.source,
        head=model.head.config.name,
        code_size=model.head.code_size,
        dense_size=4 * model.dim,
        towers="tied" if model.tied else "separate",
        dim=model.dim,
        table=_table(metrics),
        corpus="VECTORS" if model.takes_vectors else "CORPUS",
        inputs="vectors" if model.takes_vectors else "texts -> vectors",
        query="--queries QUERIES" if model.takes_vectors else '--query "your question"',
        towers_are=TOWERS["vectors" if model.takes_vectors else "texts"],
    )
    return f"---\n{data.to_yaml()}\n---\n{body}"


def _table(metrics: dict[str, float]) -> str:
    if not metrics:
        return "Not evaluated."
    kinds = sorted({metric.partition("/")[0] for metric in metrics}, reverse=True)
    names = list(dict.fromkeys(metric.partition("/")[2] for metric in metrics))
    lines = [f"| | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for kind in kinds:
        lines.append(f"| {kind} | " + " | ".join(f"{metrics[f'{kind}/{name}']:.4f}" for name in names) + " |")
    return "\n".join(lines)
