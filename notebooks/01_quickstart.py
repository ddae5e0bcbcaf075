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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dynmoe-jax/dynmoe_jax/blob/main/notebooks/01_quickstart.ipynb)
#
# # Every token chooses its number of experts
#
# You train a small Mixture-of-Experts language model with Top-P routing, watch how many experts
# its tokens use, and let it write. A few minutes on a laptop or on Colab.

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

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from IPython.display import HTML, display

from configs import quickstart
from dynmoe_jax import config
from dynmoe_jax.routing.routers.top_p import TopP
from dynmoe_jax.runs.load import load_run
from dynmoe_jax.runs.metrics_file import read_metrics
from dynmoe_jax.training.finish import sample
from dynmoe_jax.training.trainer import train

# %% [markdown]
# ## What Top-P routing is
#
# The router gives a token a probability for each expert. The token takes its most probable experts,
# one after another, until together they pass `p`. A sure router costs one expert, an unsure one
# several.
#
# Below, the router of the package decides for two tokens: one that it is sure of, and one that it
# is not.

# %%
router = TopP(threshold=0.4)
logits_TE = jnp.array(
    [[0.2, 3.0, 0.1, 0.5, 1.0, 0.0, 0.3, 0.4], [0.9, 1.1, 0.2, 1.2, 0.7, 0.1, 1.0, 0.4]]
)
routing = router.on_logits(logits_TE, jnp.ones(2, bool))

figure, axes = plt.subplots(1, 2, figsize=(9, 3), sharey=True, layout="constrained")
for token, axis in enumerate(axes):
    chosen = set(np.asarray(routing.expert_TK[token]).tolist())
    colors = ["tab:orange" if expert in chosen else "lightgray" for expert in range(8)]
    axis.bar(range(8), routing.probs_TE[token], color=colors)
    mass = sum(float(routing.probs_TE[token, expert]) for expert in chosen - {8})
    count = int(routing.experts_per_token_T[token])
    axis.set(title=f"{count} of 8 experts, together {mass:.2f} > 0.4", xlabel="expert")
axes[0].set_ylabel("probability")
plt.show()

# %% [markdown]
# ## Train
#
# The settings of `configs/quickstart.py`: text that comes with Python, a small model, a few hundred
# steps. Any of them can be changed here. Run the cell again, and the run continues where it was, or
# shows its results if it is complete.

# %%
settings = quickstart.get_config()
workdir = Path(os.environ.get("NOTEBOOK_WORKDIR", "runs/notebook"))

if os.environ.get("NOTEBOOK_TINY"):  # for tests: seconds instead of minutes
    settings.data.update(sources="text:dynmoe_jax/**/*.py", seq_len=32)
    settings.model.update(num_layers=2, width=32, num_heads=1, num_kv_heads=1, vocab_size=512)
    settings.model.moe.hidden_width = 32
    settings.train.update(steps=4, batch_size=4, log_every_steps=1)
    settings.evaluation.update(max_batches=1, sample_tokens=8)

cfg = config.from_config_dict(settings)
exit_code = train(cfg, workdir)

# %% [markdown]
# ## Watch the experts
#
# `metrics.jsonl` has a line per logged step. At first the router is flat, and a token needs many
# experts to reach `p`. As it learns which experts suit which tokens, fewer are enough.

# %%
lines = read_metrics(workdir)
steps = [line["step"] for line in lines]
by_layer_SN = np.array([line["experts_per_token_by_layer"] for line in lines])

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3), layout="constrained")
left.plot(steps, [line["lm_loss"] for line in lines])
left.set(title="Loss", xlabel="step", ylabel="nats per token")
for layer, experts_S in enumerate(by_layer_SN.T):
    right.plot(steps, experts_S, label=f"layer {layer}")
right.set(title="Experts per token", xlabel="step")
right.legend()
plt.show()

# %% [markdown]
# ## Load the checkpoint and let it write
#
# `load_run` gives the settings, the decoder and the tokenizer of a run. Each token of the sample
# is coloured by the experts that the model used to predict it, a mean over the layers.

# %%
cfg, decoder, tokenizer = load_run(workdir)


def show_experts(pieces):
    """Text with each piece coloured by its number of experts, from pale (one) to dark."""
    counts = [count for _, count in pieces]
    scale = plt.Normalize(1, max(1.5, *counts))
    html = ""
    for text, count in pieces:
        red, green, blue = (round(255 * part) for part in plt.cm.YlOrRd(0.7 * scale(count))[:3])
        escaped = text.replace("&", "&amp;").replace("<", "&lt;")
        style = f"background: rgb({red}, {green}, {blue}); color: black"
        html += f'<span style="{style}" title="{count:.2f} experts">{escaped}</span>'
    display(HTML(f'<pre style="white-space: pre-wrap; line-height: 1.8">{html}</pre>'))


asked = dataclasses.replace(cfg.evaluation, prompt="def main(", temperature=0.7)
written = sample(
    dataclasses.replace(cfg, evaluation=asked), nnx.state(decoder, nnx.Param), tokenizer
)
print(written.prompt)
show_experts(written.pieces)

# %% [markdown]
# ## The experts of a text of yours
#
# Each token is coloured by the experts that it uses itself. Hover over it to see the number.

# %%
text = 'def add(a, b):\n    """The sum of two numbers."""\n    return a + b\n'
ids = tokenizer.encode(text)[: cfg.data.seq_len]
tokens_BL = jnp.array([[tokenizer.bos_id, *ids]])
output = nnx.jit(lambda decoder, tokens_BL: decoder(tokens_BL))(decoder, tokens_BL)
experts_L = np.asarray(output.routing.experts_per_token[:, 0, 1:]).mean(axis=0)
show_experts([(tokenizer.decode(ids[i : i + 1]), experts_L[i]) for i in range(len(ids))])

# %% [markdown]
# ## Next
#
# - `python train.py --help` lists all settings; try `--config.model.moe.top_p.threshold=0.2`, or
#   `--config.loss.entropy.weight=0`, and compare the experts per token.
# - Train on text of yours: `--config.data.sources='text:notes/**/*.md'`.
# - The run's folder holds `report.html`, with every curve on one page.
