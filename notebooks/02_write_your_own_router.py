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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/dynmoe-jax/dynmoe_jax/blob/main/notebooks/02_write_your_own_router.ipynb)
#
# # Write your own router
#
# A router decides which experts a token uses, and how many. Here you see the routers of the package
# side by side, take Top-P apart, see what the losses pull at, and write a router of your own in 40
# lines, which trains and has its place in the report.

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
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from IPython.display import HTML, display

from configs import quickstart
from dynmoe_jax import config
from dynmoe_jax.registry import LOSSES, ROUTERS, load_plugin
from dynmoe_jax.routing import ExpertSlots, RouterInput, SoftSlots, top_p_slots
from dynmoe_jax.training.trainer import train

workdir = Path(os.environ.get("NOTEBOOK_WORKDIR", "runs/own_router"))
workdir.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Routers side by side
#
# Sixteen tokens and eight experts, the same logits for all. The tokens on top are sure of an
# expert, those below are not. Every router of the package that needs nothing but logits routes
# them; a square is as dark as the weight that the token gives to the expert's output.

# %%
TOKENS, EXPERTS = 16, 8
sharpness_T1 = jnp.linspace(3.0, 0.3, TOKENS)[:, None]
logits_TE = sharpness_T1 * jax.random.normal(jax.random.key(0), (TOKENS, EXPERTS))
everyone_T = jnp.ones(TOKENS, bool)


def combine_weights(routing):
    """[T, E] the weight of each expert in the output of each token."""
    if isinstance(routing, SoftSlots):
        return routing.combine_TEC.sum(axis=-1)
    if isinstance(routing, ExpertSlots):
        routing = routing.by_token()
    one_hot_TKE = jax.nn.one_hot(routing.expert_TK, routing.num_experts)
    return (one_hot_TKE * routing.weight_TK[..., None]).sum(axis=1)


routers = {name: kind() for name, kind in ROUTERS.items()}
of_logits = {
    name: router
    for name, router in routers.items()
    if router.logits is None and not router.reads and list(router.parameters(1, 1)) == ["router_DE"]
}
rows = -(-len(of_logits) // 4)
figure, axes = plt.subplots(rows, 4, figsize=(9, 2.6 * rows), layout="constrained", squeeze=False)
for axis in axes.flat[len(of_logits) :]:
    axis.set_axis_off()
for axis, (name, router) in zip(axes.flat, of_logits.items(), strict=False):
    weight_TE = jax.jit(
        lambda logits_TE, router=router: combine_weights(router.on_logits(logits_TE, everyone_T))
    )(logits_TE)
    axis.imshow(weight_TE, cmap="Blues", vmin=0, vmax=max(1e-6, float(weight_TE.max())))
    used = float((weight_TE > 0).sum(axis=1).mean())
    axis.set(xticks=[], yticks=[], xlabel=f"{used:.2f} experts per token")
    axis.set_title(name, fontsize=9)
plt.show()

# %% [markdown]
# ## Top-P, step by step
#
# Sort the probabilities of a token, add them up, and stop at the first expert that takes the sum
# beyond `p`. That expert is used too, so there is always one.

# %%
p, token = 0.4, TOKENS - 1
prob_E = np.sort(np.asarray(jax.nn.softmax(logits_TE[token])))[::-1]
mass_E = np.cumsum(prob_E)
used_E = mass_E - prob_E <= p  # the mass before an expert decides

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
axis.bar(range(EXPERTS), prob_E, color=np.where(used_E, "tab:orange", "lightgray"))
axis.step(range(EXPERTS), mass_E, where="mid", color="tab:blue", label="cumulative probability")
axis.axhline(p, color="black", linestyle="--", label=f"p = {p}")
axis.set(title=f"{used_E.sum()} experts", xlabel="experts, the most probable first")
axis.legend()
plt.show()

routing = jax.jit(ROUTERS["top_p"](threshold=p).on_logits)(logits_TE, everyone_T)
assert int(routing.experts_per_token_T[token]) == used_E.sum()

# %% [markdown]
# ## The bound
#
# Shapes are static under `jit`, so the number of slots of a token has to be known before. The `m`
# most probable of `E` experts hold at least `m / E` of the mass, so after `floor(p E)` experts the
# sum has reached `p`, and `K = floor(p E) + 1` slots always do. Below: K, and the most experts that
# any of 4,096 nearly undecided tokens used.

# %%
thresholds = np.linspace(0.02, 1.0, 50)
flat_TE = np.exp(0.01 * np.random.default_rng(1).normal(size=(4096, EXPERTS)))
prob_TE = -np.sort(-flat_TE / flat_TE.sum(axis=-1, keepdims=True), axis=-1)
before_TE = np.cumsum(prob_TE, axis=-1) - prob_TE
most = [(before_TE <= threshold).sum(axis=-1).max() for threshold in thresholds]

figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
bound = [top_p_slots(EXPERTS, float(threshold)) for threshold in thresholds]
axis.step(thresholds, bound, color="tab:blue", label="K")
axis.plot(thresholds, most, ".", color="tab:orange", label="most experts of a token")
axis.set(xlabel="p", ylabel="experts", title=f"{EXPERTS} experts")
axis.legend()
plt.show()
assert all(one <= other for one, other in zip(most, bound, strict=True))

# %% [markdown]
# ## What each loss does
#
# Minus the gradient on the logits: where a loss pushes them. Red goes up, blue goes down. Each loss
# of the package is shown with the first router that gives what it needs: Top-P, where that does. A
# loss of the router's parameters alone leaves the logits in peace; those of experts' parameters are
# left out.

# %%
WIDTH = 32
params = {"router_DE": jax.random.normal(jax.random.key(2), (WIDTH, EXPERTS)) / WIDTH**0.5}
x_TD = jax.random.normal(jax.random.key(3), (TOKENS, WIDTH)) * sharpness_T1
candidates = {"top_p": of_logits["top_p"], **of_logits}


def push(loss, router):
    """[T, E] minus the gradient of a loss on the logits of all tokens."""

    def value(logits_TE):
        given = RouterInput(
            x_TD,
            logits_TE,
            everyone_T,
            router.initial_state(EXPERTS),
            expected=router.bounds(EXPERTS).expected,
            length=TOKENS,
            segment_id_T=jnp.ones(TOKENS, jnp.int32),
            training=True,
        )
        sums = loss.sums(router(params, given), given, params)
        return jnp.sum(loss.value(sums, jnp.float32(TOKENS)))

    return -jax.jit(jax.grad(value))(x_TD @ params["router_DE"])


shown = {}
for name, kind in LOSSES.items():
    for router_name, router in candidates.items():
        if kind.needs <= router.gives | params.keys():
            shown[f"{name}, {router_name}"] = push(kind(), router)
            break

rows = -(-len(shown) // 4)
figure, axes = plt.subplots(rows, 4, figsize=(9, 2.6 * rows), layout="constrained", squeeze=False)
for axis in axes.flat[len(shown) :]:
    axis.set_axis_off()
for axis, (name, push_TE) in zip(axes.flat, shown.items(), strict=False):
    limit = max(float(jnp.abs(push_TE).max()), 1e-9)
    axis.imshow(push_TE, cmap="RdBu_r", vmin=-limit, vmax=limit)
    axis.set(xticks=[], yticks=[], xlabel="no push" if limit < 1e-8 else f"up to {limit:.1e}")
    axis.set_title(name, fontsize=8)
plt.show()

# %% [markdown]
# ## A router of your own
#
# Top-k whose number of experts grows with the uncertainty of the token: one expert, and a second
# one where the two most probable are closer than a margin. It is a file, so that every command can
# be told of it by `--plugin`.

# %%
plugin = workdir / "second_if_close.py"

# %%
# %%writefile {plugin}
"""A second expert for tokens that cannot decide."""

import dataclasses

import jax
import jax.numpy as jnp

from dynmoe_jax.fields import model_setting
from dynmoe_jax.registry import ROUTERS
from dynmoe_jax.routing import Bounds, Router
from dynmoe_jax.routing.record import fill_slots, softmax_scores


@ROUTERS.register("second_if_close")
@dataclasses.dataclass(frozen=True)
class SecondIfClose(Router):
    """The most probable expert, and the next one if it is nearly as probable."""

    margin: float = model_setting(
        0.1, "largest gap between the two probabilities", low=0.0, high=1.0
    )

    def bounds(self, num_experts):
        """One or two experts."""
        return Bounds(slots=2, fewest=1, expected=1.5, usual_rows=1.75)

    def __call__(self, params, given):
        """Routes T tokens."""
        probs_TE, logits_TE = softmax_scores(given.logits_TE, given.valid_T)
        top_T2, expert_T2 = jax.lax.top_k(jax.lax.stop_gradient(probs_TE), 2)
        close_T = top_T2[:, 0] - top_T2[:, 1] <= self.margin
        keep_T2 = jnp.stack([given.valid_T, given.valid_T & close_T], axis=-1)
        return fill_slots(probs_TE, logits_TE, expert_T2, keep_T2, renormalize=True)


# %% [markdown]
# That is all. Its setting, help and checks, metrics and the report follow from the class.

# %%
load_plugin(str(plugin))

settings = quickstart.get_config()
settings.model.moe.router = "second_if_close"
settings.model.moe.second_if_close.margin = 0.2

if os.environ.get("NOTEBOOK_TINY"):  # for tests: seconds instead of minutes
    settings.data.update(sources="text:dynmoe_jax/**/*.py", seq_len=32)
    settings.model.update(num_layers=2, width=32, num_heads=1, num_kv_heads=1, vocab_size=512)
    settings.model.moe.hidden_width = 32
    settings.train.update(steps=4, batch_size=4, log_every_steps=1)
    settings.evaluation.update(max_batches=1, sample_tokens=8)

cfg = config.from_config_dict(settings)
exit_code = train(cfg, workdir)

# %% [markdown]
# `report.html` in the run's folder has every curve on one page. Here is its part about what the
# choice of experts depends on.

# %%
report = (workdir / "report.html").read_text(encoding="utf-8")
style = re.search("<style>.*?</style>", report, re.DOTALL)[0]
lead = re.search('<p class="lead">.*?</p>', report, re.DOTALL)[0]
part = re.search("<h2>What the choice of experts.*?(?=<h2>)", report, re.DOTALL)[0]
display(HTML(f"<div style='zoom: 0.7'>{style}{lead}{part}</div>"))

# %% [markdown]
# ## Next
#
# - [docs/routers.md](https://github.com/dynmoe-jax/dynmoe_jax/blob/main/docs/routers.md) says what
#   else a router may have: parameters, noise, a state, logits of its own.
# - `python train.py --plugin=second_if_close.py --config=configs/quickstart.py
#   --config.model.moe.router=second_if_close` does the same from the command line.
# - `python -m dynmoe_jax.evaluation --plugin=second_if_close.py --workdir=RUN --routing` says who
#   uses how many experts: by token, position, surprise.
