"""DeepSeekMoE version 1 in PyTorch, by the formulas of arXiv 2401.06066 (section 3).

transformers has no class for it.  Attention, norms and positions are those of its Llama; the
feed-forwards are written out here, under the names of the released code.
"""

import torch
import transformers
from torch import nn
from torch.nn.functional import silu


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Mixture(nn.Module):
    def __init__(self, hf):
        super().__init__()
        width, hidden = hf["hidden_size"], hf["moe_intermediate_size"]
        self.gate = nn.Linear(width, hf["n_routed_experts"], bias=False)
        self.experts = nn.ModuleList(
            FeedForward(width, hidden) for _ in range(hf["n_routed_experts"])
        )
        self.shared_experts = FeedForward(width, hidden * hf["n_shared_experts"])
        self.k, self.renormalize = hf["num_experts_per_tok"], hf["norm_topk_prob"]

    def forward(self, x):
        tokens = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(tokens).softmax(-1).topk(self.k, dim=-1)
        if self.renormalize:
            weights = weights / weights.sum(-1, keepdim=True)
        rows = []
        for token, weight, experts in zip(tokens, weights, chosen, strict=True):
            rows.append(
                sum(w * self.experts[e](token) for w, e in zip(weight, experts, strict=True))
            )
        return torch.stack(rows).reshape(x.shape) + self.shared_experts(x)


def make(hf):
    """A random model of a ``config.json``."""
    names = transformers.LlamaConfig().to_dict()
    cfg = transformers.LlamaConfig(**{name: value for name, value in hf.items() if name in names})
    model = transformers.LlamaForCausalLM(cfg)
    for i, layer in enumerate(model.model.layers):
        if i >= hf["first_k_dense_replace"] and i % hf["moe_layer_freq"] == 0:
            layer.mlp = Mixture(hf)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            nn.init.normal_(parameter, std=hf["initializer_range"])
    return model
