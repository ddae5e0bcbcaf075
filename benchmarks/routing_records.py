"""Memory of routing records: what leaves the loop over layers with and without asking for them.

    python -m benchmarks.routing_records

By shapes alone, so nothing is computed: 58 MoE layers of 256 experts (DeepSeek-V3's, arXiv
2412.19437) with top-8, and a batch of 8 x 4096 tokens on one device.  Asked for, every layer's
probabilities, logits, choices and weights leave the loop; in training alone the sums over tokens.
"""

import argparse
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from benchmarks.command import run
from dynmoe_jax import config
from dynmoe_jax.model import decoder_shapes
from dynmoe_jax.model.decoder import keep_record
from dynmoe_jax.model.layer import LayerOutput
from dynmoe_jax.training.loss import TrainingLoss

LAYERS, EXPERTS, TOP = 58, 256, 8


def settings(length: int) -> config.Config:
    """Settings with so many layers and experts; widths do not matter to records."""
    model = config.Model(
        num_layers=LAYERS,
        width=64,
        num_heads=4,
        num_kv_heads=4,
        head_width=16,
        vocab_size=512,
        max_seq_len=length,
        moe=config.MoE(num_experts=EXPERTS, hidden_width=32, router="top_k", top_k={"k": TOP}),
    )
    return config.Config(model=model, data=config.Data(seq_len=length))


def batch_shapes(sequences: int, length: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of a batch."""
    names = ("tokens", "targets", "segment_ids", "positions")
    return dict.fromkeys(names, jax.ShapeDtypeStruct((sequences, length), jnp.int32))


def record_bytes(cfg: config.Config, batch: dict[str, Any]) -> int:
    """Bytes of the records of all layers, where they are asked for."""
    return _bytes_tapped(cfg, batch, keep_record)


def load_bytes(cfg: config.Config, batch: dict[str, Any]) -> int:
    """Bytes of the loads of all experts alone, as an evaluation takes them."""
    return _bytes_tapped(cfg, batch, lambda output: output.moe.routing.load_E)


def _bytes_tapped(
    cfg: config.Config, batch: dict[str, Any], taps: Callable[[LayerOutput], Any]
) -> int:
    structure, params = nnx.split(decoder_shapes(cfg.model))

    def tapped(params, batch):
        decoder = nnx.merge(structure, params)
        inputs = batch["tokens"], batch["segment_ids"], batch["positions"]
        return decoder.tapped(*inputs, taps)[1]

    return _bytes(jax.eval_shape(tapped, params, batch))


def training_bytes(cfg: config.Config, batch: dict[str, Any]) -> int:
    """Bytes of the sums of all layers, which leave them in training."""
    shapes = decoder_shapes(cfg.model)
    structure, params = nnx.split(shapes)
    loss = TrainingLoss.of(cfg, shapes)

    def sums(params, batch):
        found = loss.sums(nnx.merge(structure, params), batch)
        return found.layers, found.dropped

    return _bytes(jax.eval_shape(sums, params, batch))


def _bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def main() -> None:
    """Prints the bytes of both."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=8, help="of the batch")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a sequence")
    asked = parser.parse_args()
    cfg, batch = settings(asked.length), batch_shapes(asked.sequences, asked.length)
    print(f"{LAYERS} layers of {EXPERTS} experts, {asked.sequences} x {asked.length} tokens")
    for name, count in (
        ("records, asked for", record_bytes),
        ("loads, in evaluation", load_bytes),
        ("sums, in training", training_bytes),
    ):
        print(f"{name:<22}{count(cfg, batch):>16,} bytes")


if __name__ == "__main__":
    run(main)
