"""Made-up text for the tests of the data package."""

import json
import random

_WORDS = (
    "the a token chooses its experts router layer and of model gate probability threshold "
    "until mass passes for in every with paper loss balance entropy def return self import class "
    "if else while x y z = + ( ) [ ] : naïve 数据 Müller 😀 "
)
WORDS = _WORDS.split()


def sentence(rng: random.Random) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randint(3, 25))) + rng.choice([".\n", ";\n\n", "\n\t"])


def write_jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
