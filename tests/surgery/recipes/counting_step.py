"""A step that counts how often it was begun, and waits: a plug-in for tests."""

import dataclasses
import time
from pathlib import Path

from dynmoe_jax.surgery.recipes.step import STEPS, Price, Result, Step
from dynmoe_jax.surgery.storage.target import written_whole


@STEPS.register("count")
@dataclasses.dataclass(frozen=True)
class Count(Step):
    """Adds a line to ``begun.txt`` of the folder above, waits, and writes a file."""

    seconds: float = 0.0
    after: Step | None = None

    @property
    def needs(self):
        return () if self.after is None else (self.after,)

    def facts(self):
        return {"seconds": self.seconds}

    def price(self):
        return Price(flops=10.0, seconds=1.0)

    def message(self, place, text):
        return {"seconds": self.seconds, "name": self.name}

    @staticmethod
    def do(job, folder: Path):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with (folder.parent.parent / "begun.txt").open("a") as file:
            file.write(f"{job['name']}\n")
        with written_whole(folder) as unfinished:
            time.sleep(job["seconds"])
            (unfinished / "made.txt").write_text(job["name"])
        return 0

    def result(self, folder):
        return Result(note=(folder / "made.txt").read_text())
