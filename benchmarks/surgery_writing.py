"""An upcycling without its proof, for `benchmarks.surgery_upcycle`.

A process of its own: ``python -m benchmarks.surgery_writing FROM TO DTYPE``.
"""

import sys
from pathlib import Path

from dynmoe_jax.hardware.huge_pages import restart_with_huge_pages


def write(parent: Path, to: Path, dtype: str) -> None:
    """Writes tokenizer and checkpoint, with digests and checksums, as the operation does."""
    from benchmarks.surgery_upcycle import EXPERTS, TOP_K
    from dynmoe_jax.runs.begun import make_folder
    from dynmoe_jax.surgery.operations.upcycle import Upcycle
    from dynmoe_jax.surgery.request import Options, Request, checked
    from dynmoe_jax.surgery.storage.write import write_result

    operation = Upcycle(num_experts=EXPERTS, top_k=TOP_K)
    options = Options(data="python", dtype=dtype)  # nothing of it is read
    with checked(Request(operation, (parent,), to, options)) as job:
        make_folder(to)
        tokenizer = job.parents[0].tokenizer()
        tokenizer.save(to / tokenizer.name_in_run)
        write_result(
            to,
            operation,
            job.parents,
            job.cfg,
            name="surgery: upcycle",
            tokenizer=tokenizer.fingerprint,
            seed=0,
            moments=False,
            dtype=dtype,
        )
        assert job.parents[0].digest


if __name__ == "__main__":
    restart_with_huge_pages()
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
