"""Score contracts: what a query and a document vector score, in training, evaluation and the index alike.

Shapes: B queries, N documents, D dimensions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float

__all__ = ["Metric", "score_matrix"]

Metric = Literal["inner_product", "l2"]
"""`inner_product`: q . x. `l2`: 1 - ||q - x||^2 / 2, which is q . x for unit vectors.

For compressed unit vectors the two differ: a reconstruction is shorter than the vector it stands for, the more so the
worse it is, and `l2` gives back half of the lost squared length.
"""


def score_matrix(
    queries: Float[Tensor, "B D"], documents: Float[Tensor, "N D"], metric: Metric
) -> Float[Tensor, "B N"]:
    """Return the score of every query with every document; higher is better."""
    products = queries @ documents.T
    if metric == "inner_product":
        return products
    lengths = queries.square().sum(1, keepdim=True) + documents.square().sum(1)
    return products - lengths / 2 + 1
