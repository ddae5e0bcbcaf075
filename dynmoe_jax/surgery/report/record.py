"""Record of a result: all that ``surgery.json`` holds, and its page shows."""

import dataclasses
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.surgery.measuring.measure import Measured, Routed
from dynmoe_jax.surgery.operation import settings_of
from dynmoe_jax.surgery.report.provenance import versions
from dynmoe_jax.surgery.request import Job
from dynmoe_jax.surgery.size import Size, size_of
from dynmoe_jax.surgery.storage.parent import Parent
from dynmoe_jax.surgery.storage.write import Digests


def record_of(
    job: Job, digests: Digests, files: list[Path], measured: Measured, content: str
) -> dict[str, Any]:
    """The record, but for samples and seconds.

    Args:
      job: what was asked for.
      digests: of the result.
      files: that hold its numbers.
      measured: what both models do.
      content: digest of the text that they were measured on.
    """
    asked, first = job.asked, job.parents[0]
    after = size_of(job.cfg, asked.options.dtype)
    losses, routed = measured.all, (measured.routed_before, measured.routed_after)
    return {
        "operation": asked.name,
        "settings": dict(settings_of(asked.operation)),
        "options": dataclasses.asdict(asked.options),
        "parents": [_parent(parent) for parent in job.parents],
        "digest": digests.model,
        "moments_digest": digests.moments,
        "exact": {"promised": job.promise, "measured": measured.relative_difference},
        "before": _size(first.config.model, size_of(first.config), first.files())
        | _measured(losses.loss_before, losses.bits_before, routed[0]),
        "after": _size(job.cfg.model, after, files)
        | _measured(losses.loss_after, losses.bits_after, routed[1]),
        "compared": {
            "all": dataclasses.asdict(measured.all),
            "domains": {name: dataclasses.asdict(x) for name, x in measured.domains.items()},
            "largest_logit": measured.largest_logit,
        },
        "data": {"sources": job.cfg.data.sources, "content": content},
        "moments": "carried" if job.moments else "none",
        "remarks": job.remarks,
        "history": job.history,
        "versions": versions(),
    }


def file_bytes(files: list[Path]) -> int:
    """Bytes of files, counted on disk."""
    return sum(file.stat().st_size for file in files)


def _parent(parent: Parent) -> dict[str, Any]:
    return {
        "folder": str(parent.folder.absolute()),
        "digest": parent.digest,
        "file_bytes": file_bytes(parent.files()),
        "moments": parent.has_moments,
    }


def _size(model: config.Model, size: Size, files: list[Path]) -> dict[str, Any]:
    """One side by arithmetic and by its files."""
    layers = [
        {
            "experts": layer.model.moe.num_experts if layer.is_moe else 0,
            "width": layer.model.moe.hidden_width if layer.is_moe else layer.model.hidden_width,
        }
        for layer in model.by_layer
    ]
    counted = {
        "file_bytes": file_bytes(files),
        "layers": layers,
        "routers": [router.describe() for router in model.routers],
    }
    return dataclasses.asdict(size) | counted


def _measured(loss: float, bits: float, routed: Routed) -> dict[str, Any]:
    """One side by what it does with the text."""
    return {
        "heldout_loss": loss,
        "heldout_bits_per_byte": bits,
        "experts_per_token": routed.experts_per_token,
        "load": {str(layer): shares for layer, shares in routed.load.items()},
        "router_entropy": {str(layer): nats for layer, nats in routed.entropy.items()},
    }
