"""Sequence-level top-k at the quickstart's size: two experts per token, shared by a sequence.

    python train.py --config=configs/routers/seq_top_k.py --workdir=runs/seq_top_k

SeqTopK (arXiv 2511.06494): the best pairs of a token and an expert in a whole sequence are used,
two per token on average, between one and four.  So a later token counts in training, which
`allow_non_causal` accepts.  Generation and evaluation go token by token, within the same budget.
The paper gains most where a model of plain top-k is trained further for some hundred steps
(`config.train.init_from`).  Expect exactly 2.0 experts per token in training, a little less at
inference.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.allow_non_causal = "seq_top_k", True
    moe.seq_top_k.k = 2
    # Entropy is the dynamic model's loss.
    settings.loss.entropy.weight = 0.0
    return settings
