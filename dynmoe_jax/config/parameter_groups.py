"""Names that ``config.train.trainable`` gives to parts of a model."""

GROUPS = {
    "router": "what chooses experts, with the gate of a shared expert",
    "experts": "the experts that routers choose from",
    "dense": "feed-forwards that every token uses: dense layers, and shared experts",
    "attention": "matrices of queries, keys, values and outputs",
    "norms": "scales of the norms",
    "vocabulary": "the embedding and the output projection",
}
"""Parts by name; each parameter of a model belongs to one of them."""

NOT = "not:"
"""Stands before what is frozen, where all the rest is trained."""
