"""Top-p as the paper has it, at the quickstart's size.

    python train.py --config=configs/routers/top_p.py --workdir=runs/top_p

Harder Tasks Need More Experts (arXiv 2403.07652): a token takes its most probable experts until
their probabilities pass p = 0.4, weighed by these very probabilities; the losses are balance (1e-2)
and entropy.  Expect a start near 3 of 8 experts per token, the most that p allows being 4; the
number falls as the router learns which experts a token needs.  The entropy loss weighs more than
the paper's 1e-4, which shows after billions of tokens; this run has half a million.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    settings.model.moe.router = "top_p"
    return settings
