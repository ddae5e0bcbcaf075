"""Whether the harness's ``hf`` model gives the same answers and points, item by item.

    python -m benchmarks.evaluation_parity --model=SmolLM2-135M-Instruct.Q4_1.gguf \\
        --data_dir=items --tasks=piqa,bbh --limit=200

The same weights in float32, tasks, items and tokens in both, as in `benchmarks.evaluation`, but
each task once and nothing is timed.  ``--softmax=float64`` has ``hf`` compute log-probabilities of
its float32 logits in float64 (its own option ``softmax_dtype``): torch's float32 log_softmax is a
little too high (docs/measurements.md: torch-log-softmax), which long continuations add up.  Needs
the extras ``bench`` and ``eval``.
"""

import argparse
import dataclasses
import json
import sys

from benchmarks.columns import columns
from benchmarks.command import need, run
from benchmarks.evaluation import add_case_flags, largest_difference, our_cases
from benchmarks.evaluation_cases import Asked, answers, points
from benchmarks.machine import pin_threads, with_machine

LIMIT = 1e-3
HEADINGS = ("task", "items", "requests", "points", "hf points", "largest difference", "others")


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation_parity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_flags(parser, limit=200)
    parser.add_argument("--batch_size", default="4", help="of hf")
    parser.add_argument("--softmax", choices=("float32", "float64"), default="float32")
    return parser.parse_args(argv)


def compare(
    mine: dict[str, list], theirs: dict[str, list], my_points: dict, their_points: dict
) -> list[dict]:
    """The figures of each task; arguments as :func:`answers` and :func:`points` give them."""
    records = []
    for task, answered in mine.items():
        largest, others = largest_difference({task: answered}, theirs)
        records.append(
            {
                "task": task,
                "requests": len(answered),
                "points": my_points[task],
                "hf_points": their_points[task],
                "largest_log_prob_difference": largest,
                "other_answers": others,
            }
        )
    return records


def _row(found: dict) -> tuple[str, ...]:
    return (
        found["task"],
        str(found["items"]),
        str(found["requests"]),
        f"{found['points']:.3f}",
        f"{found['hf_points']:.3f}",
        f"{found['largest_log_prob_difference']:.1e}",
        str(found["other_answers"]),
    )


def main(argv: list[str]) -> list[dict]:
    """Compares, prints each task as it is done and a table; returns what the table holds."""
    flags = parse(argv)
    need("bench", "eval")
    pin_threads(flags.threads)
    from benchmarks.worker import Worker

    asked = Asked(
        model=flags.model,
        data_dir=flags.data_dir,
        tasks=tuple(flags.tasks.split(",")),
        limit=flags.limit,
        threads=flags.threads,
        max_new_tokens=flags.max_new_tokens,
        softmax=flags.softmax,
    )
    request = {**dataclasses.asdict(asked), "batch_sizes": [flags.batch_size]}
    worker = Worker.of_module("benchmarks.evaluation_torch", json.dumps(request))
    cases, _ = our_cases(asked, flags.batch_tokens)
    records = []
    for name in asked.tasks:
        theirs = f"hf_{flags.batch_size}/{name}"
        case = cases[f"ours/{name}"]
        case()
        worker.seconds(theirs)
        mine, given = case.found, (worker.seconds(f"{w}/{theirs}") for w in ("answers", "points"))
        their_answers, their_points = given
        for record in compare(answers(mine), their_answers, points(mine), their_points):
            record["items"] = mine["n-samples"][record["task"]]["effective"]
            records.append(record)
            print("  ".join(_row(record)), flush=True)
        with_machine("benchmarks.evaluation_parity", {"records": records}, flags.json)
    worker.close()
    print("\n" + "\n".join(columns([HEADINGS, *map(_row, records)])))
    largest = max(record["largest_log_prob_difference"] for record in records)
    others = sum(record["other_answers"] for record in records)
    same = all(record["points"] == record["hf_points"] for record in records)
    print(
        f"\n{'met   ' if largest <= LIMIT else 'MISSED'}  largest difference of a log-likelihood: "
        f"{largest:.2e} <= {LIMIT}"
        f"\n{'met   ' if same and not others else 'MISSED'}  points equal, {others} other answers"
    )
    return records


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
