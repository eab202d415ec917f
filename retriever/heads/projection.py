"""Projection head: a linear map in front of another head, learned so that what a short code keeps of it ranks.

Principal components keep the variance of documents, whatever queries ask. Here the map is learned before anything is
quantized: the code is stood in for by Gaussian noise of its rate (Cover & Thomas, 2006, section 10.3), and the noisy
documents have to rank for queries as the documents do (ListNet, Cao et al., 2007). Variance is then where queries
tell documents apart. Queries are those of training; where they are few, half are crops of documents. That quantization
noise may take the quantizer's place while a transform is learned: Balle et al., 2017, section 3.

Shapes: N documents, B queries, D dimensions, E dimensions of the map's output.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from retriever.errors import InputError
from retriever.heads.base import QuantizerFit
from retriever.heads.ivfrq import IVFResidualQuantizer
from retriever.heads.pca import PCA, PCAConfig
from retriever.heads.residual import Asked
from retriever.heads.rq import ResidualQuantizer, ResidualQuantizerConfig

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["Projection", "ProjectionConfig", "noise_level"]

QUERIES_AT_ONCE = 128
DOCUMENTS_AT_ONCE = 8192
TINY = 1e-12  # variance of a corpus whose documents are all alike


@dataclass(frozen=True, kw_only=True)
class ProjectionConfig(PCAConfig):
    """Size of a `Projection`, how it is learned, and the head behind it.

    Attributes:
        components: E, at most the dimension; 12 a byte of the code.
        fit_steps: Steps in which the map is learned, each with 128 queries and at most 8,192 documents of the warm
            start's sample; 0 leaves the principal components.
        fit_lr: Learning rate of Adam, which falls linearly to 0; the map's rows begin with length 1.
        fit_temperature: Of the ranking that is taught, as `DistillationConfig.temperature`.
        fit_crops_below: With fewer training queries, half of those of a step are crops of documents; 0: never.
        query_weight: Of the expected query in the choice of a document's code, for residual quantizers; 0 chooses the
            nearest code. Searching takes no longer, encoding does.
    """

    name: ClassVar[str] = "projection"
    learns_from_queries: ClassVar[bool] = True

    fit_steps: int = 800
    fit_lr: float = 5e-4
    fit_temperature: float = 0.02
    fit_crops_below: int = 4000
    query_weight: float = 0.0

    def __post_init__(self) -> None:
        for name in ("fit_steps", "fit_crops_below"):
            if getattr(self, name) < 0:
                raise InputError(f"{name} must be at least 0, got {getattr(self, name)}.")
        for name in ("fit_lr", "fit_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be above 0 and finite, got {getattr(self, name)}.")
        if not 0 <= self.query_weight < math.inf:
            raise InputError(f"query_weight must be at least 0 and finite, got {self.query_weight}.")
        super().__post_init__()

    def wants_crops(self, queries: int) -> bool:
        """Return whether so many training queries are fewer than `fit_crops_below`."""
        return queries < self.fit_crops_below

    def check(self, dim: int) -> None:
        """Raise InputError if the components are too many, or the inner head does not choose codes by queries."""
        super().check(dim)
        if self.query_weight and not isinstance(self.inner, ResidualQuantizerConfig):
            raise InputError(
                f"query_weight {self.query_weight} is for inner residual quantizers, got inner "
                f"{self.inner.name if self.inner else None!r}. Set query_weight 0."
            )

    def build(self, dim: int) -> Projection:
        """Return the head for vectors of `dim` dimensions."""
        return Projection(self, dim)


class Projection(PCA):
    """y = A (x - mean), then the inner head. A is fixed at the warm start; towers and inner head train on.

    Without queries (`warm_start`) A are the principal components.

    Args:
        config: Dimensions, learning of A, the inner head.
        dim: Dimension D of the vectors.

    Raises:
        InputError: If D does not fit `config`, or the inner head's metric is not l2.
    """

    _config: ProjectionConfig
    query_slope: Tensor
    query_mean: Tensor
    document_mean: Tensor
    spread: Tensor

    def __init__(self, config: ProjectionConfig, dim: int) -> None:
        super().__init__(config, dim)
        if config.query_weight:  # without queries the expected query is the vector itself
            self.register_buffer("query_slope", torch.eye(self.out_dim))
            self.register_buffer("query_mean", torch.zeros(self.out_dim))
            self.register_buffer("document_mean", torch.zeros(self.out_dim))
            self.register_buffer("spread", torch.ones(()))

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "N D"]) -> Int[Tensor, "N M"]:
        """Map as queries are mapped, then return the inner head's codes, chosen for the expected queries, too."""
        y = self.map_queries(x)
        if not self._config.query_weight:
            return self.inner.encode(y)
        assert isinstance(self.inner, ResidualQuantizer | IVFResidualQuantizer)
        asked = Asked(self._expected_queries(y) - y, self._config.query_weight / self.spread)
        return self.inner.encode(y, asked)

    def _expected_queries(self, y: Float[Tensor, "N E"]) -> Float[Tensor, "N E"]:
        """Return the query that is expected for mapped documents: the linear regression learned at the start."""
        with torch.autocast(y.device.type, enabled=False):
            return self.query_mean + (y - self.document_mean) @ self.query_slope

    @torch.no_grad()
    def warm_start_to_rank(
        self,
        sample: Float[Tensor, "n D"],
        queries: Sequence[Float[Tensor, "m D"]],
        fit: QuantizerFit,
        seed: int,
    ) -> None:
        """Learn A from the principal components on, and start the inner head from what A makes of the sample."""
        self._config.check_sample(len(sample))
        self._start_components(sample)
        with torch.enable_grad(), torch.autocast(self.mean.device.type, enabled=False):
            kinds = [kind.to(self.mean) - self.mean for kind in queries if len(kind)]
            x = sample.to(self.mean) - self.mean
            matrix = self._learn(x, kinds, seed) if kinds else self.matrix
        self.matrix.copy_(matrix)
        if self._config.query_weight and kinds:
            self._regress(x, kinds)
        self._start_inner(sample, fit, seed)

    def _regress(self, x: Float[Tensor, "n D"], kinds: Sequence[Float[Tensor, "m D"]]) -> None:
        """Learn the expected query of a document by ridge regression of mapped queries on their nearest documents."""
        y, pairs = x @ self.matrix.T, []
        for kind in kinds:
            parts = kind.split(QUERIES_AT_ONCE)
            nearest = torch.cat([_closeness(part, x).argmax(1) for part in parts])
            pairs.append((y[nearest].double(), (kind @ self.matrix.T).double()))
        document_mean = torch.stack([found.mean(0) for found, _ in pairs]).mean(0)
        query_mean = torch.stack([asked.mean(0) for _, asked in pairs]).mean(0)
        identity = torch.eye(len(document_mean)).to(document_mean)
        moments = [
            (
                (found - document_mean).T @ (found - document_mean) / len(found),
                (found - document_mean).T @ (asked - query_mean) / len(found),
            )
            for found, asked in pairs
        ]
        own, cross = (torch.stack(moment).mean(0) for moment in zip(*moments, strict=True))
        strength = own.diagonal().mean().clamp(min=TINY)
        self.query_slope.copy_(torch.linalg.solve(own + strength * identity, cross))
        self.query_mean.copy_(query_mean)
        self.document_mean.copy_(document_mean)
        self.spread.copy_(y.square().sum(1).mean().clamp(min=TINY))

    def _learn(
        self, x: Float[Tensor, "n D"], kinds: Sequence[Float[Tensor, "m D"]], seed: int
    ) -> Float[Tensor, "E D"]:
        """Minimize the cross-entropy between the rankings of documents and of noisy mapped documents."""
        config, generator = self._config, torch.Generator(x.device).manual_seed(seed)
        covariance = x.double().T.cov(correction=0).to(x)
        matrix = self.matrix.detach().clone().requires_grad_()
        optimizer = torch.optim.Adam([matrix], lr=config.fit_lr)
        for step in range(config.fit_steps):
            optimizer.param_groups[0]["lr"] = config.fit_lr * (1 - step / config.fit_steps)
            each = QUERIES_AT_ONCE // len(kinds)
            q = torch.cat([kind[_draw(len(kind), each, generator)] for kind in kinds])
            documents = x[_draw(len(x), DOCUMENTS_AT_ONCE, generator)] if len(x) > DOCUMENTS_AT_ONCE else x
            target = (_closeness(q, documents) / config.fit_temperature).softmax(1)
            y = documents @ matrix.T
            if config.inner is not None:
                y = _through_channel(y, matrix @ covariance @ matrix.T, self.rate, generator)
            scores = _closeness(q @ matrix.T, y) / config.fit_temperature
            loss = -(target * scores.log_softmax(1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return matrix.detach()


def noise_level(covariance: Float[Tensor, "E E"], bits: float) -> Float[Tensor, ""]:
    """Return the variance, with gradients, of white noise that leaves a Gaussian source of a covariance so many bits.

    The rate of y + noise is 1/2 log2 det(I + covariance / level). The level is found by bisection, and its gradient
    is that of the rate's equation (one step of Newton, which leaves the value as it is).
    """
    with torch.no_grad():
        variances = (
            torch.linalg.eigvalsh(covariance.double()).cpu().clamp(min=1e-30)
        )  # not waited for in every step
        low = -math.log(float(variances.max())) - 50.0  # of log 1 / level
        high = low + 100.0 + 2 * math.log(2) * bits / len(variances)
        for _ in range(60):
            middle = (low + high) / 2
            rate = torch.log2(1 + math.exp(middle) * variances).sum() / 2
            low, high = (middle, high) if rate < bits else (low, middle)
        signal = math.exp(middle) * variances
        slope = float((signal / (1 + signal)).sum() / (2 * math.log(2)))
    exact = covariance.double() * math.exp(middle) + torch.eye(len(covariance), device=covariance.device)
    rate = torch.linalg.slogdet(exact).logabsdet / (2 * math.log(2))
    inverse = middle - (rate - rate.detach()) / slope  # falls where the rate rises
    return torch.exp(-inverse).to(covariance)


def _through_channel(
    y: Float[Tensor, "n E"], covariance: Float[Tensor, "E E"], bits: float, generator: torch.Generator
) -> Float[Tensor, "n E"]:
    """Return the expectation of vectors of which noise leaves so many bits."""
    covariance = covariance.double()
    level, identity = noise_level(covariance, bits), torch.eye(len(covariance)).to(covariance)
    noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    shrink = identity - torch.linalg.inv(identity + covariance / level)  # C (C + level)^-1
    expected: Tensor = (y + level.sqrt().to(y) * noise) @ shrink.to(y)
    return expected


def _closeness(q: Float[Tensor, "B E"], x: Float[Tensor, "N E"]) -> Float[Tensor, "B N"]:
    """Return half the negative squared distances, up to a number for each query: q x of vectors of equal length."""
    return q @ x.T - x.square().sum(1) / 2


def _draw(count: int, size: int, generator: torch.Generator) -> Tensor:
    return torch.randint(count, (size,), generator=generator, device=generator.device)
