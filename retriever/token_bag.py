"""TokenBag: a text's vector is the mean of its tokens' vectors. No attention, no position; for CPUs.

Shapes: B texts, L tokens of the longest, T tokens of all texts, V token ids, D dimensions.

On disk it is sentence-transformers' `StaticEmbedding`: `tokenizer.json` beside `model.safetensors`, whose
`embedding.weight` is the matrix (V, D). The larger part of the time goes into splitting the text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn

from retriever.errors import InputError

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["NO_LIMIT", "TokenBag"]

NO_LIMIT = 2**31 - 1  # tokens of a text, where the folder states no length: all are kept


class TokenBag(nn.Module):
    """The backbone of a static encoder: one vector a token, and their mean.

    Args:
        weight: Vector of every token id.
    """

    def __init__(self, weight: Float[Tensor, "V D"]) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag.from_pretrained(weight, freeze=False, mode="mean")

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.embedding.embedding_dim

    def forward(
        self, input_ids: Int[Tensor, "B L"], attention_mask: Int[Tensor, "B L"]
    ) -> Float[Tensor, "B D"]:
        """Return the mean vector of every text's tokens; zero for a text without tokens."""
        kept = attention_mask.bool()
        lengths = kept.sum(1)
        return self.embedding(input_ids[kept], lengths.cumsum(0) - lengths)  # type: ignore[no-any-return]

    def save(self, folder: Path, tokenizer: Tokenizer, max_length: int) -> None:
        """Write `model.safetensors` and `tokenizer.json`, which cuts texts at `max_length` tokens."""
        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {"embedding.weight": self.embedding.weight.detach().contiguous()}, folder / "model.safetensors"
        )
        cutting = plain_tokenizer(tokenizer)
        if max_length < NO_LIMIT:
            cutting.enable_truncation(max_length)
        cutting.save(str(folder / "tokenizer.json"))

    @classmethod
    def load(cls, weights: Path, tokenizer: Path) -> tuple[TokenBag, Tokenizer, int]:
        """Return matrix, tokenizer and the length at which the tokenizer's file says to cut, else `NO_LIMIT`.

        Raises:
            InputError: If a file is damaged, or the matrix has no row for a token.
        """
        weight = _read_matrix(weights)
        try:
            splitter = Tokenizer.from_file(str(tokenizer))
        except Exception as error:  # tokenizers raises no narrower class
            raise InputError(f"{tokenizer} is not a tokenizer: {error}. Restore the file.") from None
        highest = max(splitter.get_vocab().values(), default=-1)
        if highest >= len(weight):
            raise InputError(
                f"{weights} has {len(weight)} rows, but {tokenizer} has token ids up to {highest}. "
                "Take both files from one model."
            )
        cut = splitter.truncation or {"max_length": NO_LIMIT, "direction": "right"}
        if cut["direction"] != "right":
            raise InputError(f"{tokenizer} cuts texts on the left; Endex keeps the first tokens of a text.")
        return cls(weight), plain_tokenizer(splitter), cut["max_length"]


def plain_tokenizer(tokenizer: Tokenizer) -> Tokenizer:
    """Return a copy that neither cuts nor pads."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.no_padding()
    copy.no_truncation()
    return copy


def _read_matrix(path: Path) -> Float[Tensor, "V D"]:
    """Return the matrix of a StaticEmbedding in float32.

    Model2Vec's own files have `embeddings`, and where its vocabulary was clustered, `mapping` from token id to row
    and `weights` of the token ids; sentence-transformers reads them as `embeddings[mapping] * weights`.
    """
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is not a safetensors file: {error}. Restore the file.") from None
    weight = tensors.get("embedding.weight", tensors.get("embeddings"))
    if weight is None or weight.ndim != 2 or not weight.numel():
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items()) or "nothing"
        raise InputError(f"{path} must hold a matrix embedding.weight (tokens, dimensions), got {found}.")
    weight = weight.float()
    if "embedding.weight" not in tensors:
        if "mapping" in tensors:
            weight = weight[tensors["mapping"].long()]
        if "weights" in tensors:
            weight = weight * tensors["weights"].float()[:, None]
    if not weight.isfinite().all():
        raise InputError(f"{path} holds vectors that are not finite. Restore the file or train again.")
    return weight.contiguous()
