"""Plans a run on hardware that you don't have yet.

    python -m dynmoe_jax.planning --config=configs/paper/moe_dynamic.py --topology=v5p:4x4x4

compiles the real training step ahead of time for a TPU slice, on a machine without a TPU (extra
tpu-aot), and shows whether it fits, how long a step takes, and where the time goes.  With --compile
it does so for GPUs (extra gpu-aot).

  --topology=NAME          a TPU slice such as v5p:4x4x4 or v6e:8x8, or GPUs such as h100:8 or
                           h100:4x8 (nodes x GPUs of one), which are planned by arithmetic
  --compile                compile the step for GPUs, too
  --search                 try the meshes of that topology and rank them
  --experts_per_token=N    mean experts of a token; by default k of top-k, 1.76 of top-p (what the
                           paper reports of its trained model)
  --json=PATH              write all figures there, too
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags

from dynmoe_jax import command_line, config
from dynmoe_jax.console import console
from dynmoe_jax.planning.planner import Request, plan_run, search_meshes
from dynmoe_jax.planning.report import print_plan
from dynmoe_jax.planning.search_report import print_search

EXIT_DOES_NOT_FIT = command_line.EXIT_OUT_OF_MEMORY


def parse(argv: Sequence[str]) -> tuple[Request, bool, Path | None]:
    """(what is to be planned, whether to search, where figures go) of a command line.

    Raises:
      ConfigError: an unknown flag or setting, a wrong type, or a value out of range.
    """
    values = flags.FlagValues()
    topology = flags.DEFINE_string("topology", "", "the hardware", flag_values=values)
    search = flags.DEFINE_bool("search", False, "rank meshes", flag_values=values)
    experts = flags.DEFINE_float("experts_per_token", None, "mean experts", flag_values=values)
    compiled = flags.DEFINE_bool("compile", False, "compile for GPUs", flag_values=values)
    path = flags.DEFINE_string("json", "", "where figures go", flag_values=values)
    try:
        rest = values(list(argv), known_only=True)
    except flags.Error as error:
        raise config.ConfigError(" ".join(str(error).split())) from error
    cfg, _ = command_line.parse(rest)
    if not topology.value:
        raise config.ConfigError(
            "--topology is missing: name the hardware, such as --topology=v5p:4x4x4."
        )
    request = Request(cfg, topology.value, experts.value, compiled.value)
    return request, search.value, Path(path.value).expanduser() if path.value else None


def main() -> int:
    """Plans; the exit code is that of exhausted memory if nothing fits."""
    if any(argument in ("--help", "-h", "-help", "--helpfull") for argument in sys.argv[1:]):
        return command_line.run(lambda *_: 0, __doc__)
    request, search, path = parse(sys.argv)
    # Nothing runs; and whatever accelerator is here stays free.
    jax.config.update("jax_platforms", "cpu")
    if search:
        found = search_meshes(request)
        print_search(found)
        figures, fits = found.to_dict(), bool(found.ranked)
    else:
        plan = plan_run(request)
        print_plan(plan)
        figures, fits = plan.to_dict(), plan.memory.fits
    if path:
        _write(path, figures)
    return 0 if fits else EXIT_DOES_NOT_FIT


def _write(path: Path, figures: dict) -> None:
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise config.ConfigError(
            f"--json={path} cannot be written ({error.strerror}); name a file in a folder that "
            "exists."
        ) from error
    console.print(f"Figures written to {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(command_line.exit_code(main))
