"""Top-any gating at the quickstart's size: learned thresholds, and experts that come and go.

    python train.py --config=configs/routers/top_any.py --workdir=runs/top_any

DynMoE (arXiv 2405.14297): a token uses every expert whose vector it is like enough, each weighed
by 1/n.  Experts that no token of 50 steps has used are removed, and one is added where tokens had
none: the paper waits, records and rests for 300 updates each, scaled to this run.  Expect about
half of the experts per token at the start, whose cosine is positive; `router_live_experts` says how
many there are.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router = "top_any"
    moe.top_any.wait = moe.top_any.window = moe.top_any.rest = 50
    # Scores are no softmax.
    settings.loss.entropy.weight = 0.0
    return settings
