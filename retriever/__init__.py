"""Text -> vector -> code: the two towers and the compression heads."""

from retriever.beir import Qrels, RetrievalData, read_negatives
from retriever.data import Collator, Document, Query, TextPair, TokenBatch, Tokens
from retriever.dual_encoder import DualEncoder, Embeddings, model_fingerprint
from retriever.dual_encoder_config import DualEncoderConfig
from retriever.encoder import Encoder, EncoderSettings
from retriever.errors import InputError
from retriever.inference import Precision, embed_documents, embed_queries, map_queries
from retriever.lora import LoraConfig
from retriever.sources import read_corpus, read_data, read_qrels, read_queries
from retriever.static import static_encoder

__version__ = "0.1.0"

__all__ = [
    "Collator",
    "Document",
    "DualEncoder",
    "DualEncoderConfig",
    "Embeddings",
    "Encoder",
    "EncoderSettings",
    "InputError",
    "LoraConfig",
    "Precision",
    "Qrels",
    "Query",
    "RetrievalData",
    "TextPair",
    "TokenBatch",
    "Tokens",
    "embed_documents",
    "embed_queries",
    "map_queries",
    "model_fingerprint",
    "read_corpus",
    "read_data",
    "read_negatives",
    "read_qrels",
    "read_queries",
    "static_encoder",
]
