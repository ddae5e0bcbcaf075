"""The MoE layer in PyTorch: a loop over experts, and Hugging Face's Mixtral block.

Run by `benchmarks.moe_layer` as a process of its own: ``python -m benchmarks.layer_torch JSON``.
"""

import json
import sys
import time

import torch
from torch import nn

from benchmarks.layer_cases import Arrays, Choice, Preset, draw
from benchmarks.worker import serve


class Expert(nn.Module):
    """SwiGLU: down(silu(gate x) * up x), gate and up in one product."""

    def __init__(self, gate_up_D2F, down_FD):
        super().__init__()
        self.gate_up = nn.Parameter(gate_up_D2F.T.contiguous())
        self.down = nn.Parameter(down_FD.T.contiguous())

    def forward(self, x):
        """x -> y, both [rows, D]."""
        gate, up = nn.functional.linear(x, self.gate_up).chunk(2, dim=-1)
        return nn.functional.linear(nn.functional.silu(gate) * up, self.down)


class LoopOverExperts(nn.Module):
    """The plain MoE layer of PyTorch code, dropless: gather, compute, ``index_add_`` per expert."""

    def __init__(self, arrays: Arrays):
        super().__init__()
        self.choice = Choice("top_1", k=1)
        self.router = nn.Parameter(torch.from_numpy(arrays.router_DE.T.copy()))
        self.experts = nn.ModuleList(
            Expert(torch.from_numpy(gate_up), torch.from_numpy(down))
            for gate_up, down in zip(arrays.gate_up_ED2F, arrays.down_EFD, strict=True)
        )

    def route(self, x):
        """(expert, weight) of each slot; an expert of E is none."""
        logits = nn.functional.linear(x, self.router) * self.choice.scale
        weight, expert = torch.sort(torch.softmax(logits, -1), dim=-1, descending=True)
        if self.choice.k:
            weight, expert = weight[:, : self.choice.k], expert[:, : self.choice.k]
            return expert, weight / weight.sum(-1, keepdim=True)
        outside = torch.cumsum(weight, -1) - weight > self.choice.p
        return expert.masked_fill(outside, len(self.experts)), weight.masked_fill(outside, 0.0)

    def forward(self, x):
        """x -> y, both [T, D]."""
        chosen, weight = self.route(x)
        y = torch.zeros_like(x)
        for e, expert in enumerate(self.experts):
            token, slot = torch.where(chosen == e)
            if len(token):
                y.index_add_(0, token, expert(x[token]) * weight[token, slot, None])
        return y


def mixtral_block(arrays: Arrays, implementation: str) -> nn.Module:
    """Hugging Face's Mixtral block with the same weights; ``gate.top_k`` is k."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    experts, hidden, width = arrays.down_EFD.shape
    config = MixtralConfig(hidden_size=width, intermediate_size=hidden, num_local_experts=experts)
    config._experts_implementation = implementation
    block = MixtralSparseMoeBlock(config)
    gate_up = torch.from_numpy(arrays.gate_up_ED2F)
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(arrays.router_DE.T))
        block.experts.gate_up_proj.copy_(gate_up.transpose(1, 2))
        block.experts.down_proj.copy_(torch.from_numpy(arrays.down_EFD).transpose(1, 2))
    return block


class _Timed:
    """One layer in one direction, timed."""

    def __init__(self, layer: nn.Module, arrays: Arrays, choice: Choice, backward: bool):
        self.layer, self.choice, self.backward = layer, choice, backward
        batch = () if isinstance(layer, LoopOverExperts) else (1,)
        shape = (*batch, *arrays.x_TD.shape)
        self.x = torch.from_numpy(arrays.x_TD).reshape(shape).requires_grad_(backward)
        self.dy = torch.from_numpy(arrays.dy_TD).reshape(shape)

    def __call__(self) -> float:
        if isinstance(self.layer, LoopOverExperts):
            self.layer.choice = self.choice
        else:
            self.layer.gate.top_k = self.choice.k
        begin = time.perf_counter()
        with torch.set_grad_enabled(self.backward):
            y = self.layer(self.x)
        if self.backward:
            y.backward(self.dy)
        seconds = time.perf_counter() - begin
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None
        return seconds


def make_layer(arrays: Arrays, method: str) -> nn.Module:
    """The layer that a method names: ``torch_loop``, ``hf_eager`` or ``hf_grouped_mm``."""
    if method == "torch_loop":
        return LoopOverExperts(arrays)
    return mixtral_block(arrays, method.removeprefix("hf_"))


def cases(
    preset: Preset, chosen: list[Choice], methods: list[str], directions: list[str]
) -> dict[str, _Timed]:
    """``{"method/choice/direction": case}``; Mixtral blocks know top-k only."""
    arrays = draw(preset)
    layers = {method: make_layer(arrays, method) for method in methods}
    return {
        f"{method}/{choice.name}/{direction}": _Timed(layer, arrays, choice, direction == "train")
        for choice in chosen
        for method, layer in layers.items()
        for direction in directions
        if choice.k or method == "torch_loop"
    }


def main() -> None:
    """Serves the cases that the JSON in the first argument asks for."""
    asked = json.loads(sys.argv[1])
    torch.set_num_threads(asked["threads"])
    preset = Preset(**asked["preset"])
    chosen = [Choice(**choice) for choice in asked["choices"]]
    serve(cases(preset, chosen, asked["methods"], asked["directions"]))


if __name__ == "__main__":
    main()
