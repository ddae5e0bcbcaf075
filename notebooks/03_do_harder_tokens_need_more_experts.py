# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dynmoe-jax/dynmoe_jax/blob/main/notebooks/03_do_harder_tokens_need_more_experts.ipynb)
#
# # Do harder tokens need more experts?
#
# You train small Top-P models from several seeds, measure on held-out text how the number of
# experts of a token goes with how hard it was, and compare with two controls. Every answer has an
# interval, and may be that nothing is certain.

# %% [markdown]
# ## Set up
#
# On Colab this fetches the project. Elsewhere, run the notebook in a checkout, after
# `pip install -e .`

# %%
import os
import subprocess
import sys
from pathlib import Path

if "google.colab" in sys.modules and not Path("train.py").exists():
    repository = "https://github.com/dynmoe-jax/dynmoe_jax"
    subprocess.run(["git", "clone", "--depth=1", repository, "checkout"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "./checkout"], check=True)
    os.chdir("checkout")

here = Path.cwd()
os.chdir(next(folder for folder in (here, *here.parents) if (folder / "train.py").exists()))

# %%
import dataclasses

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import HTML, display

from dynmoe_jax.evaluation.report.parts import coloured, table_of
from dynmoe_jax.evaluation.report.theme import HEAT
from dynmoe_jax.evaluation.routing.words import Words
from dynmoe_jax.runs.formatting import decimals
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.records import from_json
from dynmoe_jax.study.comparison.plan import Request
from dynmoe_jax.study.measures.trained import TrainedRun
from dynmoe_jax.study.questions.question import SILENT
from dynmoe_jax.study.study import study

# %% [markdown]
# ## What is asked
#
# [Harder Tasks Need More Experts](https://arxiv.org/abs/2403.07652) has every token take its most
# probable experts until together they pass `p`. It reports that
#
# - harder tasks, and ambiguous words, use more experts;
# - experts per token fall as training goes on: 2.42 after 8 billion tokens, 1.82 after 100 billion;
# - the lowest layers use up to 4, the highest about 1.
#
# A task is not a token, so the first of these is asked here of tokens, with the model's own loss in
# nats as the measure of how hard one is. There are two losses to ask about, and they are not the
# same thing: that of the token which is *predicted* where the experts are used, and that of the
# token which is *read* there.
#
# A rank correlation alone says little: a router that was never trained may show one too, and where
# an id that often precedes surprises gets many experts wherever it stands, no router has seen that
# one place is harder than another. So there are two controls:
#
# - **router never trained**: the same model with the routers that its seed drew at the start;
# - **shuffled within token ids**: each token gets the number of experts of another one with the
#   same id, so that all that is left is what the id says.

# %% [markdown]
# ## Run the study
#
# `dynmoe_jax.study` trains the models, measures them and answers. Before it begins, it says how
# long it will take here. Interrupt the cell, and what is under way is saved; run it again, and the
# study continues where it was, or shows its answers if it is complete.
#
# One seed says nothing of what another one would give. Intervals over seeds are Student's, and of
# seeds that spread alike two give one more than three times as wide as three do.

# %%
workdir = Path(os.environ.get("NOTEBOOK_WORKDIR", "runs/harder_tokens"))
asked = Request(
    "laptop", workdir, seeds=3, models=("dynamic", "dynamic_no_entropy"), questions=(2, 3)
)

if os.environ.get("NOTEBOOK_TINY"):  # for tests: seconds instead of minutes
    fewer = {"seeds": 1, "models": ("dynamic",), "sources": "text:dynmoe_jax/**/*.py"}
    asked = dataclasses.replace(asked, size="tiny", **fewer)

exit_code = study(asked)

# %% [markdown]
# ## The answers
#
# `study.json` has all numbers, and a sentence for each answer, which is made of its number and its
# interval. An interval holds 95 %: chance of seeds and chance of what was measured, added in
# quadrature; with one seed, of what was measured alone. *Undecided* is an answer too.

# %%
record = from_json((workdir / "study.json").read_text(encoding="utf-8"))


def interval(answer):
    return " to ".join(decimals(end, 3) for end in answer["interval"])


display(
    HTML(
        table_of(
            ["asked", "estimate", "95 % interval", "unit", "found here", "the paper", "agrees"],
            [
                [
                    answer["question"],
                    decimals(answer["estimate"], 3),
                    interval(answer),
                    answer["unit"],
                    answer["sentence"],
                    answer["paper"],
                    "–" if answer["paper"] == SILENT else answer["agrees_with_paper"],
                ]
                for answer in record["answers"]
            ],
        )
    )
)

# %% [markdown]
# ## Beside the controls
#
# The same correlation, cut in several ways. *Within token ids* compares occurrences of one id with
# each other, *across* compares ids by their means; *within layers* and *across layers* are over
# pairs of a token and a layer. What training has made of the router is what goes beyond the router
# that was never trained; what the context adds to the token is what goes beyond the shuffled one,
# which across ids is the same because shuffling leaves their means.

# %%
data = {part["number"]: part["data"] for part in record["questions"]}
kinds = data[3]["kinds"]

figure, axis = plt.subplots(figsize=(8, 4), layout="constrained")
for number, model in enumerate(next(iter(kinds.values()))):
    value_C, low_C, high_C = (
        np.array([of_kind[model][name] for of_kind in kinds.values()])
        for name in ("value", "low", "high")
    )
    places_C = np.arange(len(kinds)) + 0.22 * (number - 1)
    reach_2C = [value_C - low_C, high_C - value_C]
    axis.errorbar(value_C, places_C, xerr=reach_2C, fmt="o", capsize=2, label=model)
axis.axvline(0, color="black", linewidth=1)
axis.set_yticks(range(len(kinds)), kinds)
axis.invert_yaxis()
axis.set(xlabel="rank correlation with the number of experts, 95 % intervals")
figure.legend(loc="outside upper right", ncols=3)
plt.show()

# %% [markdown]
# ## Experts against surprise
#
# A correlation hides the shape. Here are held-out tokens in classes of their surprise, of the first
# seed; bands are 95 % intervals by a bootstrap over documents.

# %%
experts = data[3]["routing"]["experts_per_token"]

figure, axis = plt.subplots(figsize=(7, 3.5), layout="constrained")
for which, name in (("predicted_token", "predicted there"), ("token_itself", "read there")):
    classes = experts[f"by_surprise_of_{which}"]
    surprise_C, mean_C, low_C, high_C = (
        [part[key] for part in classes] for key in ("surprise", "mean", "low", "high")
    )
    axis.plot(surprise_C, mean_C, marker="o", markersize=3.5, label=f"token that is {name}")
    axis.fill_between(surprise_C, low_C, high_C, alpha=0.18)
axis.set(xlabel="surprise: loss in nats", ylabel="experts per token")
axis.legend()
plt.show()

# %% [markdown]
# ## Experts over training
#
# A mean over the tokens of a batch and all layers, a line for each seed.

# %%
figure, axis = plt.subplots(figsize=(7, 3), layout="constrained")
for number, (title, curves) in enumerate(data[2].items()):
    for seed, curve in enumerate(curves):
        label = {} if seed else {"label": title}
        axis.plot(curve["step"], curve["experts"], color=f"C{number}", **label)
axis.set(xlabel="step", ylabel="experts per token")
axis.set_ylim(bottom=0)
axis.legend()
plt.show()

# %% [markdown]
# ## A passage that no model was trained on
#
# Each run of the study is a run like any other, which `load_run` opens. Each token is colored by
# the experts that it uses itself, a mean over the layers; hover over it to see the number. It is
# one passage: look for what you would like to ask of all of them, and then ask it of all.

# %%
run = workdir / "runs" / "dynamic" / "0"
cfg, decoder, tokenizer = load_run(run)
batch = next(next(iter(TrainedRun(run).batches().values())))
tokens_L, segment_ids_L, positions_L = (
    batch[name][0] for name in ("tokens", "segment_ids", "positions")
)
output = nnx.jit(lambda decoder, *row: decoder(*row))(
    decoder, tokens_L[None], segment_ids_L[None], positions_L[None]
)
experts_L = np.asarray(output.routing.experts_per_token[:, 0]).mean(axis=0)

words = Words(tokenizer)
text, key = coloured(
    [
        (words.text(int(token)), float(count))
        for token, count, segment in zip(tokens_L, experts_L, segment_ids_L, strict=True)
        if segment
    ]
)
shades = "".join(
    f".heat{step} {{ background: {color}; color: black; font-style: normal }}"
    for step, (color, _) in enumerate(HEAT)
)
passage = f'<pre style="white-space: pre-wrap; line-height: 1.8">{text}</pre>'
display(HTML(f"<style>{shades}</style>{key}{passage}"))

# %% [markdown]
# ## The same of a run of yours
#
# Any run with experts can be asked who uses how many, by layer, domain, token, position in the
# document and in the word, and surprise:
#
# ```
# python -m dynmoe_jax.evaluation --workdir=RUN --routing
# ```
#
# writes `RUN/routing.html` and `routing.json`, without the controls. The study on text of yours:
#
# ```
# python -m dynmoe_jax.study --size=laptop --workdir=runs/mine --questions=2,3 \
#     --models=dynamic,dynamic_no_entropy --data='jsonl:corpus/*.jsonl.zst'
# ```
#
# ## Next
#
# - `study.html` in the study's folder has everything on one page: by layer, by domain, by position.
# - `--size=gpu` trains models with more than 100M active parameters; without `--models` and
#   `--questions`, the study compares them with dense, Top-1 and Top-2 models.
# - [01_quickstart](https://github.com/dynmoe-jax/dynmoe_jax/blob/main/notebooks/01_quickstart.ipynb)
#   trains one model step by step.
