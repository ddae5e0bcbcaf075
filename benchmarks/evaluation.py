"""Evaluation on a CPU: this project's model of lm-evaluation-harness against the harness's ``hf``.

    python -m benchmarks.evaluation --model=SmolLM2-135M-Instruct.Q4_1.gguf --data_dir=items

The same weights in float32, tasks, items, tokens and threads.  Seconds are those that the harness
spends in the model.  ``hf`` runs with several batch sizes in a process of its own, and each task
counts with its fastest one.  Answers are compared too.  Needs the extras ``bench`` and ``eval``.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from benchmarks.columns import columns
from benchmarks.command import need, run
from benchmarks.evaluation_cases import Asked, Case, answers, points, tasks_of
from benchmarks.machine import pin_threads, with_machine
from benchmarks.pretrained import from_pretrained
from benchmarks.timing import Mark, interleave, ratio, show_progress

TASKS = (
    "piqa,hellaswag,arc_easy,commonsense_qa,"
    "bbh_fewshot_boolean_expressions,bbh_fewshot_date_understanding,bbh_fewshot_navigate"
)
LIMIT = 1.5
HEADINGS = (
    "task", "hf / ours [quartiles]", "items/s", "hf items/s", "tokens/s", "hf tokens/s",
    "read", "hf batch", "points", "hf points", "largest difference",
)  # fmt: skip


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_case_flags(parser, limit=16)
    parser.add_argument("--batch_sizes", default="1,4,16", help="of hf; auto is one too")
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    return parser.parse_args(argv)


def add_case_flags(parser: argparse.ArgumentParser, limit: int) -> None:
    """The flags that say what is evaluated, and where; ``limit`` items of each task by default."""
    parser.add_argument("--model", required=True, help="folder, or GGUF file, of a Llama")
    parser.add_argument("--data_dir", required=True, help="folder with the tasks' items")
    parser.add_argument("--tasks", default=TASKS, help=f"comma-separated; {TASKS} by default")
    parser.add_argument("--limit", type=int, default=limit, help="items of each task")
    parser.add_argument("--batch_tokens", type=int, default=2048, help="of this project's model")
    parser.add_argument("--max_new_tokens", type=int, default=32, help="tokens written at the most")
    parser.add_argument("--threads", type=int, default=2, help="cores for both models")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every figure here")


class SharedTokenizer:
    """Transformers' tokenizer with the names of this project's, so that both read the same."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_id = tokenizer.eos_token_id
        self.bos_id = self.eos_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        self.begins_with_bos = tokenizer.encode("a")[0] == tokenizer.bos_token_id

    def encode(self, text: str) -> np.ndarray:
        """Token ids without BOS."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False), np.int32)

    def decode(self, ids) -> str:
        """Text of token ids."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=True)


def our_cases(asked: Asked, batch_tokens: int):
    """(this project's model on each task by name, the token counters of the last call)."""
    from transformers import AutoTokenizer

    from dynmoe_jax.evaluation.harness.answers import AnswerFile
    from dynmoe_jax.evaluation.harness.model import HarnessModel
    from dynmoe_jax.evaluation.scoring.scoring import Scorer
    from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
    from dynmoe_jax.interop import load_hf

    decoder = load_hf(asked.model)
    tokenizer = SharedTokenizer(from_pretrained(AutoTokenizer, asked.model))
    scorer = Scorer(decoder, batch_tokens, asked.max_length)
    writer = TreeWriter(decoder, batch_tokens, tokenizer.vocab_size, tokenizer.eos_id)
    folder = Path(tempfile.mkdtemp())

    def make() -> HarnessModel:
        for counter in (scorer, writer):
            counter.tokens_asked = counter.tokens_read = 0
        kept = AnswerFile(folder / "answers.jsonl", asked.model, resume=False)
        return HarnessModel(scorer, writer, tokenizer, kept, asked.max_new_tokens)

    def tokens() -> tuple[int, int]:
        return (
            scorer.tokens_asked + writer.tokens_asked,
            scorer.tokens_read + writer.tokens_read,
        )

    cases = {f"ours/{n}": Case(make, parts, asked.limit) for n, parts in tasks_of(asked).items()}
    return cases, tokens


class Counted:
    """A case that also notes the tokens it was asked for and those it read."""

    def __init__(self, case: Case, tokens):
        self.case, self.tokens = case, tokens
        self.asked = self.read = 0

    def __call__(self) -> float:
        """Seconds."""
        seconds = self.case()
        self.asked, self.read = self.tokens()
        return seconds


def largest_difference(ours: dict[str, list], theirs: dict[str, list]) -> tuple[float, int]:
    """(largest difference of a log p, answers that differ otherwise)."""
    largest, other = 0.0, 0
    for task, mine in ours.items():
        for one, two in zip(mine, theirs[task], strict=True):
            if isinstance(one, str):
                other += one != two
            else:
                largest = max(largest, abs(one[0] - two[0]))
                other += one[1] != two[1]
    return largest, other


def record(name: str, seconds, counted: Counted, worker, batch_sizes: list[str]) -> dict:
    """The figures of one task."""
    taken = {size: seconds[f"hf_{size}/{name}"] for size in batch_sizes}
    best = min(taken, key=lambda size: float(np.nanmedian(taken[size])))
    ours, theirs = seconds[f"ours/{name}"], taken[best]
    given = worker.seconds(f"answers/hf_{best}/{name}")
    largest, other = largest_difference(answers(counted.case.found), given)
    items = sum(n["effective"] for n in counted.case.found["n-samples"].values())
    median, their_median = float(np.nanmedian(ours)), float(np.nanmedian(theirs))
    return {
        "task": name,
        "hf_over_ours": dataclasses.asdict(ratio(theirs, ours)),
        "items": items,
        "seconds": median,
        "hf_seconds": their_median,
        "hf_batch_size": best,
        "tokens_asked": counted.asked,
        "tokens_read": counted.read,
        "points": _mean(points(counted.case.found)),
        "hf_points": _mean(worker.seconds(f"points/hf_{best}/{name}")),
        "largest_log_prob_difference": largest,
        "other_answers": other,
    }


def _mean(by_task: dict[str, float]) -> float:
    return float(np.mean(list(by_task.values())))


def _row(found: dict) -> tuple[str, ...]:
    over = found["hf_over_ours"]
    items, tokens = found["items"], found["tokens_asked"]
    return (
        found["task"],
        f"{over['median']:.2f} [{over['low']:.2f}, {over['high']:.2f}]",
        f"{items / found['seconds']:.2f}",
        f"{items / found['hf_seconds']:.2f}",
        f"{tokens / found['seconds']:,.0f}",
        f"{tokens / found['hf_seconds']:,.0f}",
        f"{found['tokens_read'] / tokens:.0%}",
        found["hf_batch_size"],
        f"{found['points']:.3f}",
        f"{found['hf_points']:.3f}",
        f"{found['largest_log_prob_difference']:.1e}"
        + (f", {found['other_answers']} others" if found["other_answers"] else ""),
    )


def main(argv: list[str]) -> dict:
    """Measures, prints table and mark, writes the JSON and returns what it holds."""
    flags = parse(argv)
    need("bench", "eval")
    pin_threads(flags.threads)
    from benchmarks.worker import Worker

    names, batch_sizes = flags.tasks.split(","), flags.batch_sizes.split(",")
    asked = Asked(
        flags.model, flags.data_dir, tuple(names), flags.limit, flags.threads, flags.max_new_tokens
    )
    request = {**dataclasses.asdict(asked), "batch_sizes": batch_sizes}
    worker = Worker.of_module("benchmarks.evaluation_torch", json.dumps(request))
    cases, tokens = our_cases(asked, flags.batch_tokens)
    counted = {name: Counted(case, tokens) for name, case in cases.items()}
    theirs = [name for name in worker.names if name.startswith("hf_")]
    runs = dict(counted) | {name: lambda name=name: worker.seconds(name) for name in theirs}
    seconds = interleave(runs, flags.rounds, show_progress(flags.rounds))
    rows = [record(n, seconds, counted[f"ours/{n}"], worker, batch_sizes) for n in names]
    worker.close()

    best = [seconds[f"hf_{row['hf_batch_size']}/{row['task']}"] for row in rows]
    together = ratio(np.sum(best, axis=0), np.sum([seconds[f"ours/{n}"] for n in names], axis=0))
    mark = Mark("items/s of all tasks, ours / hf", LIMIT, together, at_least=True)
    print("\n".join(columns([HEADINGS, *map(_row, rows)])))
    print(f"\nmark\n{mark}")
    result = {
        "records": rows,
        "marks": [dataclasses.asdict(mark)],
        "seconds": {name: list(values) for name, values in seconds.items()},
    }
    return with_machine("benchmarks.evaluation", result, flags.json)


if __name__ == "__main__":
    run(lambda: main(sys.argv[1:]))
