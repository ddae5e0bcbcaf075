"""Grove MoE at the quickstart's size: top-4 of 16 experts, and a narrow one for each pair of them.

    python train.py --config=configs/routers/grove.py --workdir=runs/grove

Grove MoE (arXiv 2508.07785): two experts make a group with an adjugate expert, which a token that
uses either of them uses once, weighed by the sum of their weights times 0.05.  A token so computes
two to four adjugate experts: more where its experts are of different groups.  The paper chooses by
the sigmoid of the logits, which orders experts as the logits do, and weighs by the softmax over
those chosen.  Expect the losses of a fixed number of experts, about 3.6 narrow rows a token beside
its four.
"""

from configs.quickstart import get_config as quickstart


def get_config():
    """The settings of the run."""
    settings = quickstart()
    moe = settings.model.moe
    moe.router, moe.num_experts, moe.hidden_width = "top_k", 16, 128
    moe.top_k.k, moe.top_k.renormalize = 4, True
    moe.adjugate_width, moe.adjugate_group, moe.adjugate_scale = 32, 2, 0.05
    # Entropy is the dynamic model's loss; a fixed k has no use for it.
    settings.loss.entropy.weight = 0.0
    return settings
