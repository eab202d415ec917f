"""How much faster QINCo encodes than the plain form that evaluates every codeword's full concatenation; same codes.

Both run in this process, alternating, with one network: the plain form on chunks that stay in the caches, for a few of
the vectors (its time is proportional to their number); the head's encoder on all of them in one call. Networks are
trained a little first, with QINCo2's short lists, which train the same networks at a fraction of the time: bounds are
of no use where nothing is learned. Vectors are random, of a decaying spectrum, or those of a file.
Times are the process's CPU time, so that neighbours on the machine count for less; the fastest of the repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import common
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from index import FaissFit
from retriever.heads import QINCo, QINCo2Config, QINCoConfig

PAIRS = 2048  # pairs of vector and codeword that the plain form evaluates at once; larger chunks are slower


def main() -> None:
    parser = common.benchmark_parser(__doc__)
    parser.add_argument("--dims", type=int, nargs="+", default=[128, 384], help="D of random vectors")
    parser.add_argument("--vectors", help="take the first rows of this .npy instead")
    parser.add_argument("--bytes", type=int, default=8, help="M, codebooks of 8 bits")
    parser.add_argument("--blocks", type=int, default=2, help="L, residual blocks of a step")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units of a block")
    parser.add_argument("--rows", type=int, default=4096, help="vectors in a call of the encoder")
    parser.add_argument("--plain_rows", type=int, default=128, help="vectors that the plain form encodes")
    parser.add_argument("--steps", type=int, default=300, help="training steps of 256 vectors")
    parser.add_argument("--repeats", type=int, default=3, help="measurements, of which the fastest counts")
    options = parser.parse_args()
    if options.quick:
        options.bytes, options.rows, options.steps, options.repeats = 3, 1024, 20, 1
        options.plain_rows, options.dims = 32, options.dims[:1]
    torch.set_num_threads(1)
    sets = [load(options)] if options.vectors else [random_vectors(dim, options) for dim in options.dims]
    rows = [measure(x, options) for x in sets]
    common.print_table(f"QINCo, {options.bytes} bytes, {options.rows:,} vectors a call", rows)
    common.write_result(options.json, options, rows)


def load(options: Any) -> Tensor:
    """Return the first vectors of a file as float32."""
    return torch.from_numpy(np.load(options.vectors, mmap_mode="r")[:20_000].astype(np.float32))


def random_vectors(dim: int, options: Any) -> Tensor:
    """Return Gaussian vectors around 500 centres, the i-th component of deviation 1 / sqrt(i)."""
    generator = torch.Generator().manual_seed(options.seed)
    spectrum = torch.arange(1, dim + 1) ** -0.5
    centres = torch.randn(500, dim, generator=generator)[torch.randint(500, (20_000,), generator=generator)]
    return (centres + torch.randn(20_000, dim, generator=generator)) * spectrum


def measure(x: Tensor, options: Any) -> dict[str, Any]:
    """Train a head, encode by both forms, and return a row of the table."""
    head = trained(x, options)
    some, few = x[: options.rows], x[: min(options.plain_rows, options.rows)]
    plain, fast = [], []
    for _ in range(options.repeats):
        seconds, expected = timed(lambda: encode_plainly(head, few))
        plain.append(1e6 * seconds / len(few))
        seconds, codes = timed(lambda: head.encode(some))
        fast.append(1e6 * seconds / len(some))
    same = (codes[: len(few)] == expected).all(1).double().mean().item()
    return {
        "dimension": x.shape[1],
        "plain, µs a vector": min(plain),
        "encoder, µs a vector": min(fast),
        "times faster": min(plain) / min(fast),
        "equal codes": same,
    }


def timed(call: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """Return CPU seconds of the process, and the result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def trained(x: Tensor, options: Any) -> QINCo:
    """Return a QINCo whose weights are those of a QINCo2 of its size, trained for some steps."""
    sizes = {"num_codebooks": options.bytes, "num_blocks": options.blocks, "hidden": options.hidden}
    torch.manual_seed(options.seed)
    teacher = QINCo2Config(**sizes, width=x.shape[1], candidates=4, beam=1).build(x.shape[1])
    teacher.warm_start(x, FaissFit(kmeans_iterations=10), options.seed)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=2e-3, weight_decay=0.0)
    for _ in tqdm(range(options.steps), desc=f"train, {x.shape[1]} dimensions"):
        losses = teacher(x[torch.randint(len(x), (256,))]).losses
        torch.stack(list(losses.values())).sum().backward()
        torch.nn.utils.clip_grad_norm_(teacher.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    head = QINCoConfig(**sizes).build(x.shape[1])
    state = teacher.state_dict()
    head.load_state_dict({name: state[name] for name in head.state_dict()})
    return head.eval()


@torch.no_grad()
def encode_plainly(head: QINCo, x: Tensor) -> Tensor:
    """Return the codes by evaluating the network row by row on every pair of vector and codeword."""
    size = head.codebooks.shape[1]
    found = []
    for z in head.standardize(x).split(max(1, PAIRS // size)):
        context, codes = torch.zeros_like(z), []
        for step, words in enumerate(head.codebooks):
            network, pairs = head.network(step), words.expand(len(z), -1, -1)
            if network is not None:
                pairs = network(pairs, context[:, None].expand_as(pairs))
            code = (z[:, None] - context[:, None] - pairs).square().sum(-1).argmin(1)
            context = context + pairs[torch.arange(len(z)), code]
            codes.append(code)
        found.append(torch.stack(codes, 1))
    return torch.cat(found)


if __name__ == "__main__":
    main()
