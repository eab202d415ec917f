"""A static encoder from a transformer: every token of the vocabulary goes through it once.

The idea is Model2Vec's (Tulkens and van Dongen, 2024, https://github.com/MinishLab/model2vec): the vector of a token
is what the transformer makes of the text that is this token alone. Weights for frequent tokens are those of SIF
(Arora, Liang and Ma, ICLR 2017, "A Simple but Tough-to-Beat Baseline for Sentence Embeddings").

Shapes: V token ids, W of them words, B token ids at once, D dimensions of the transformer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer
from torch import Tensor

from retriever.encoder import Encoder, EncoderSettings
from retriever.errors import InputError
from retriever.token_bag import TokenBag, plain_tokenizer

if TYPE_CHECKING:
    from jaxtyping import Float, Int

__all__ = ["static_encoder"]

UNUSED = re.compile(r"\[unused\d+\]")  # BERT's places for tokens to come


def static_encoder(
    encoder: Encoder, *, dim: int | None = None, sif: float | None = 1e-4, batch_size: int = 512
) -> Encoder:
    """Return a static encoder whose token vectors are the transformer's vectors of the tokens alone.

    A token's vector is the pooled output of `[CLS] token [SEP]` (or what the tokenizer puts around a text). The mean
    over the tokens is subtracted: it is in every text and tells none apart. With `sif`, the vector is multiplied by
    a / (a + p), where p is the token's probability by Zipf's law, 1 / rank, and the order of the ids stands for the
    ranks: vocabularies list frequent tokens first. Special tokens and BERT's `[unused0]` to `[unused993]` have no
    rank; the one that texts contain, the unknown token, counts as little as the most frequent.

    Normalisation and length are the transformer's. Prompts are none: they add the same vectors to every text.

    Args:
        encoder: A transformer with a fast tokenizer; it is not changed.
        dim: Principal components kept of the D dimensions; None keeps all dimensions as they are.
        sif: The a of SIF; None weights all tokens alike.
        batch_size: Token ids at once.

    Raises:
        InputError: If the encoder is static already, its tokenizer is not a fast one, `dim` is more than D or an
            argument is not positive.
    """
    tokenizer = _fast_tokenizer(encoder)
    if dim is not None and not 1 <= dim <= encoder.dim:
        raise InputError(f"dim must be between 1 and the encoder's {encoder.dim}, got {dim}.")
    if sif is not None and not sif > 0:
        raise InputError(f"sif must be positive, got {sif}. Give None for equal weights.")
    if batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}.")
    words = _ranked(encoder, tokenizer)
    vectors = _token_vectors(encoder, tokenizer, batch_size)
    vectors = vectors - vectors[words].mean(0)
    if dim is not None:
        vectors = vectors @ torch.linalg.svd(vectors[words], full_matrices=False).Vh[:dim].T
    if sif is not None:
        probability = zipf(len(words))
        weight = torch.full((len(vectors),), sif / (sif + probability[0].item()))
        weight[words] = sif / (sif + probability)
        vectors = vectors * weight[:, None]
    settings = EncoderSettings(normalize=encoder.settings.normalize, max_length=encoder.settings.max_length)
    return Encoder(TokenBag(vectors), tokenizer, settings)


def zipf(count: int) -> Float[Tensor, " W"]:
    """Return the probabilities of ranks 1 to `count` by Zipf's law: 1 / rank, with sum one."""
    weights = 1 / torch.arange(1, count + 1, dtype=torch.float64)
    return (weights / weights.sum()).float()


def _fast_tokenizer(encoder: Encoder) -> Tokenizer:
    if isinstance(encoder.backbone, TokenBag):
        raise InputError("the encoder is static already. Give a transformer.")
    if not encoder.tokenizer.is_fast:
        raise InputError(
            f"a static encoder needs a tokenizer of the library tokenizers, got {type(encoder.tokenizer).__name__}. "
            "Take a model whose folder has a tokenizer.json."
        )
    return plain_tokenizer(encoder.tokenizer.backend_tokenizer)


def _ranked(encoder: Encoder, tokenizer: Tokenizer) -> Int[Tensor, " W"]:
    """Return the ids of the tokens that texts are made of, most frequent first."""
    special = set(encoder.tokenizer.all_special_ids)
    words = [
        token
        for text, token in tokenizer.get_vocab().items()
        if token not in special and not UNUSED.fullmatch(text)
    ]
    return torch.tensor(sorted(words))


@torch.inference_mode()
def _token_vectors(encoder: Encoder, tokenizer: Tokenizer, batch_size: int) -> Float[Tensor, "V D"]:
    """Return the transformer's vector, before normalisation, of each token id alone, on the CPU."""
    encoding = tokenizer.encode("a")
    places = [place for place, added in enumerate(encoding.special_tokens_mask) if not added]
    before, after = encoding.ids[: places[0]], encoding.ids[places[-1] + 1 :]
    device = next(encoder.parameters()).device
    free, training = encoder.with_settings(normalize=False), encoder.backbone.training
    free.eval()
    parts = []
    try:
        for batch in torch.arange(_rows(tokenizer), device=device).split(batch_size):
            columns = [torch.full_like(batch, token) for token in before]
            columns += [batch, *(torch.full_like(batch, token) for token in after)]
            ids = torch.stack(columns, dim=1)  # (B, 1 + special tokens)
            parts.append(free({"input_ids": ids, "attention_mask": torch.ones_like(ids)}).cpu())
    finally:
        encoder.backbone.train(training)
    return torch.cat(parts)


def _rows(tokenizer: Tokenizer) -> int:
    return max(tokenizer.get_vocab().values()) + 1
