"""Step of a recipe: an export to Hugging Face's format."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynmoe_jax import config
from dynmoe_jax.interop.files.tensor_writer import DTYPES
from dynmoe_jax.surgery.recipes.step import STEPS, Place, Price, Result, Step, model_of
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.surgery.storage.target import written_whole

START_SECONDS, BYTES_A_SECOND = 10.0, 1e8
"""Seconds of starting, and how fast a model is written, roughly."""


@STEPS.register("export")
@dataclasses.dataclass(frozen=True)
class Export(Step):
    """An export.

    Attributes:
      of: the step whose model is exported.
      dtype: that the parameters are stored in, one that files of tensors have.
    """

    of: Step
    dtype: str = "float32"

    @property
    def needs(self) -> tuple[Step, ...]:
        """The step whose model is exported."""
        return (self.of,)

    def facts(self) -> Mapping[str, Any]:
        """The type."""
        return {"dtype": self.dtype}

    def price(self) -> Price:
        """Bytes of the parameters."""
        if self.dtype not in DTYPES:
            raise config.ConfigError(f"dtype={self.dtype} must be one of {', '.join(DTYPES)}.")
        stored = size_of(model_of(self.of, self.name), self.dtype).stored_bytes
        return Price(0.0, START_SECONDS + stored / BYTES_A_SECOND, stored)

    def message(self, place: Place, text: Path) -> Mapping[str, Any]:
        """Folder and type."""
        return {"from": str(place(self.of)), "dtype": self.dtype}

    @staticmethod
    def do(job: Mapping[str, Any], folder: Path) -> int:
        """Writes the model into a folder that is there when all of it is."""
        from dynmoe_jax.interop.export_model import export_model

        with written_whole(folder) as unfinished:
            # Inside, so that what a killed export leaves beside its folder goes with ours.
            inside = unfinished / "model"
            export_model(job["from"], inside, dtype=job["dtype"])
            for path in list(inside.iterdir()):
                path.replace(unfinished / path.name)
            inside.rmdir()
        return 0

    def result(self, folder: Path) -> Result:
        """Bytes that were written."""
        size = sum(path.stat().st_size for path in folder.iterdir())
        return Result(note=f"{size / 1e6:,.1f} MB for transformers")
