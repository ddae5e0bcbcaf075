"""Pipeline from text to batches.

1. *Sources* (``config.data.sources``) yield documents: a text, its domain, and where it came from.
   What cannot be read is counted and reported by file and line.  Conversations come in the form of
   the tokenizer's chat template (:mod:`.chat`).
2. *Preparation* caps each domain, holds documents out by the hash of their text, and writes one
   TFDS dataset in ArrayRecord: a training and a held-out split per domain.
3. The *tokenizer* is any SentencePiece model, any folder of Hugging Face's with a
   ``tokenizer.json`` or a ``tokenizer.model``, or a SentencePiece model trained on the training
   splits.
4. The *training stream* cuts the data into virtual shards.  Each shard shuffles its documents anew
   in every epoch, tokenises them, packs them into full rows and mixes the domains by weight; row n
   of the stream is the next row of shard n modulo their number.  A *corruption* turns documents
   into inputs and targets before they are packed, up to a step; a *reweighting* moves the weights
   of the domains after evaluations.
5. The stream's state is kept per shard, so a run goes on with exactly the batches that it would
   have seen, also when another number of processes reads them.  *Held-out batches* are one pass
   in fixed order.
"""

from dynmoe_jax.data import reweighting
from dynmoe_jax.data.corruption.corruption import LEARNED
from dynmoe_jax.data.errors import DataError
from dynmoe_jax.data.pipeline import (
    BATCH_ARRAYS,
    Batch,
    TrainStream,
    document_batches,
    heldout_batches,
    merge_states,
    shards_of_rows,
)
from dynmoe_jax.data.preparation.prepare import Prepared, is_prepared, prepare
from dynmoe_jax.data.preparation.unchanged import check_unchanged
from dynmoe_jax.data.sources.registry import check_sources
from dynmoe_jax.data.tokenizers.api import (
    Tokenizer,
    find_tokenizer,
    kept_tokenizer,
    open_tokenizer,
    remove_tokenizer,
)
from dynmoe_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train_tokenizer
from dynmoe_jax.data.tokenizers.vocabulary import check_ids, for_rows

__all__ = [
    "BATCH_ARRAYS",
    "LEARNED",
    "Batch",
    "DataError",
    "Prepared",
    "SentencePieceTokenizer",
    "Tokenizer",
    "TrainStream",
    "check_ids",
    "check_sources",
    "check_unchanged",
    "document_batches",
    "find_tokenizer",
    "for_rows",
    "heldout_batches",
    "is_prepared",
    "kept_tokenizer",
    "merge_states",
    "open_tokenizer",
    "prepare",
    "remove_tokenizer",
    "reweighting",
    "shards_of_rows",
    "train_tokenizer",
]
