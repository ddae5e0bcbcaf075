"""Settings of the model: the decoder, and its Mixture-of-Experts layers."""

import dataclasses
from typing import Any

from dynmoe_jax.config.layers import LayerSettings, layer_models
from dynmoe_jax.fields import AUTO, free_setting, model_setting, setting
from dynmoe_jax.registry import (
    EXPERTS,
    LINEARS,
    REGULARIZERS,
    ROUTERS,
    TRANSFORMS,
    choice,
    chosen,
    complete,
    names_in,
)
from dynmoe_jax.routing import Router


@dataclasses.dataclass(frozen=True)
class MoE:
    """The Mixture-of-Experts feed-forward: who is chosen, and how the chosen are computed."""

    router: str = choice(
        ROUTERS,
        "top_p",
        "how a token chooses its experts",
        defines_model=True,
        fixed_in_run=True,
        per_layer=True,
    )
    num_experts: int = model_setting(16, "routed experts per MoE layer", low=1, per_layer=True)
    experts: str = choice(
        EXPERTS,
        "swiglu",
        "function that an expert computes; kernels know swiglu",
        defines_model=True,
        fixed_in_run=True,
        per_layer=True,
    )
    hidden_width: int = model_setting(
        2816, "hidden width of one expert", unit="units", low=1, per_layer=True
    )
    routed_scale: float = model_setting(
        1.0,
        "the routed experts' output is multiplied by this, free ones included (DeepSeek-V2)",
        above=0.0,
    )
    shared_hidden_width: int = model_setting(
        0,
        "hidden width of the expert that every token uses besides, such as shared experts "
        "(DeepSeekMoE) or a dense branch (OpenMoE); 0 = none",
        unit="units",
        low=0,
        per_layer=True,
    )
    shared_gate: bool = model_setting(
        False, "weigh the shared expert by a sigmoid of the token (Qwen2-MoE)", per_layer=True
    )
    adjugate_width: int = model_setting(
        0,
        "hidden width of the expert that each group of experts has besides, used once by a token "
        "that uses any of the group (Grove MoE); 0 = none",
        unit="units",
        low=0,
        per_layer=True,
    )
    adjugate_group: int = model_setting(
        2, "experts of a group that has such an expert; must divide num_experts", low=1
    )
    adjugate_scale: float = model_setting(
        0.05, "the output of adjugate experts is multiplied by this", above=0.0
    )
    backend: str = free_setting(
        "auto", "expert compute", choices=("auto", "reference", "capacity", "grouped")
    )
    grouped_product: str = free_setting(
        "auto",
        "what the grouped backend multiplies with; auto = by platform, see docs/design.md",
        choices=("auto", "native", "blocks", "xla", "megablox", "triton", "tokamax"),
    )
    capacity_factor: float = free_setting(
        1.25,
        "slots of the capacity backend, as a multiple of T K / E, K the bound on experts per token",
        above=0.0,
    )
    transforms: str = choice(
        TRANSFORMS,
        "",
        "changes of the routing before experts compute it, in order, with commas between them",
        many=True,
        defines_model=False,
        fixed_in_run=False,
    )
    regularizers: str = choice(
        REGULARIZERS,
        "",
        "disturbances of the routing in training alone, in order, with commas between them",
        many=True,
        defines_model=False,
        fixed_in_run=False,
    )
    normalized_logits: float = model_setting(
        0.0,
        "standard deviation that the router logits of every token are brought to, around a mean of "
        "0 (Skywork-MoE: lambda = 1); 0 = they stay as they are",
        low=0.0,
        per_layer=True,
    )
    allow_non_causal: bool = model_setting(
        False,
        "accept a router that looks at later tokens, in training or always: a model that always "
        "does cannot generate text",
    )
    saved_rows_per_token: float = free_setting(
        AUTO,
        "rows whose hidden activations are kept for backward, others are recomputed (TPU kernels "
        "that fuse SwiGLU keep none); auto = as many as the router usually chooses",
        unit="rows/token",
        low=0.0,
        auto=True,
    )
    every_n_layers: int = model_setting(
        1, "one of every n layers is MoE, the others dense; 0 = a dense model", low=0
    )
    layer_offset: int = model_setting(0, "which of every n layers is MoE, counted from 0", low=0)
    dense_first_layers: int = model_setting(
        0, "dense layers before all others (DeepSeekMoE has 1)", unit="layers", low=0
    )
    transport: str = free_setting(
        "auto",
        "how tokens reach experts on other devices (config.mesh.expert); auto = see docs/design.md",
        choices=("auto", "ring", "all_to_all", "ragged_all_to_all"),
    )
    tokens_per_pair: float = free_setting(
        0.0,
        "bound on the tokens that one device sends to another by an exchange, as a share of its "
        "own, beyond which their experts there are dropped; 0 = none, nothing is dropped",
        low=0.0,
        high=1.0,
    )

    @property
    def route(self) -> Router:
        """The router, with its settings."""
        return chosen(self, "router")

    @property
    def expert_kind(self) -> Any:
        """The :class:`~dynmoe_jax.experts.kinds.kind.ExpertKind`, with its settings."""
        return chosen(self, "experts")


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama-style decoder.  The defaults are the paper's 24-layer model."""

    num_layers: int = model_setting(24, "decoder layers", low=1)
    width: int = model_setting(1024, "width of the residual stream", unit="units", low=1)
    num_heads: int = model_setting(16, "query heads", low=1, per_layer=True)
    num_kv_heads: int = model_setting(
        16, "key/value heads; must divide num_heads", low=1, per_layer=True
    )
    head_width: int = model_setting(
        64, "width of one head; even, for RoPE", unit="units", low=2, per_layer=True
    )
    hidden_width: int = model_setting(
        2816, "hidden width of a dense feed-forward", unit="units", low=1, per_layer=True
    )
    activation: str = choice(
        EXPERTS,
        "swiglu",
        "function that a dense feed-forward computes; kernels know swiglu",
        defines_model=True,
        fixed_in_run=True,
        per_layer=True,
    )
    layers: str = model_setting(
        "",
        "what some layers have of their own, e.g. '0-3:moe.num_experts=12;5:moe.hidden_width=512'; "
        "feed_forward=dense or =moe says whether a layer has experts",
    )
    vocab_size: int = model_setting(32000, "rows of the embedding", unit="tokens", low=2)
    max_seq_len: int = setting(
        2048,
        "longest sequence the model is meant for",
        defines_model=True,
        fixed_in_run=False,
        unit="tokens",
        low=1,
    )
    tie_embeddings: bool = model_setting(
        False, "the output projection is the embedding's transpose"
    )
    attention_bias: bool = model_setting(False, "biases of queries, keys and values (Qwen2)")
    qk_norm: bool = model_setting(
        False, "RMSNorm over all queries of a token, and over all its keys (OLMoE)"
    )
    rope_theta: float = model_setting(10000.0, "base of the rotary frequencies", above=0.0)
    norm_epsilon: float = model_setting(1e-6, "added to the mean square in RMSNorm", above=0.0)
    init_std: float = model_setting(0.006, "standard deviation of every initial matrix", above=0.0)
    dtype: str = free_setting(
        "auto",
        "compute type; auto = bfloat16 on accelerators, float32 on CPU",
        choices=("auto", "float32", "bfloat16"),
    )
    remat: str = free_setting(
        "none",
        "what backward recomputes: nothing, element-wise arithmetic (and on TPU what kernels make "
        "faster than it is read), all but matrix products, or whole layers",
        choices=("none", "elementwise", "dots", "layer"),
    )
    attention: str = free_setting(
        "auto",
        "what computes attention; auto = by platform, see docs/design.md",
        choices=("auto", "native", "xla", "tiled", "triton", "cudnn", "splash", "flat", "tokamax"),
    )
    kernels: str = free_setting(
        "auto",
        "auto = the fastest that there is; plain = plain JAX everywhere, without any kernel",
        choices=("auto", "plain"),
    )
    linear: str = choice(
        LINEARS,
        "dense",
        "what stands for the matrices of attention and of the dense feed-forward",
        defines_model=True,
        fixed_in_run=True,
        per_layer=True,
    )
    unroll: int = free_setting(
        0,
        "layers (groups of them, where every n-th is MoE) that the loop over layers takes at a "
        "time; 0 = by platform, see docs/design.md",
        low=0,
    )
    mask_steps: int = model_setting(
        0,
        "updates in which the masks of parts that are new in a grown model rise from 0 to 1; 0 = "
        "no masks",
        unit="updates",
        low=0,
    )
    moe: MoE = dataclasses.field(default_factory=lambda: complete(MoE)())

    @property
    def feed_forward_kind(self) -> Any:
        """The :class:`~dynmoe_jax.experts.kinds.kind.ExpertKind` of a dense feed-forward, with its
        settings."""
        return chosen(self, "activation")

    @property
    def plain(self) -> bool:
        """Whether no kernel may compute anything."""
        return self.kernels == "plain"

    @property
    def num_groups(self) -> int:
        """Scanned groups of layers of a model whose layers repeat, each with one MoE layer unless
        the model is dense."""
        return (self.num_layers - self.moe.dense_first_layers) // (self.moe.every_n_layers or 1)

    @property
    def by_layer(self) -> tuple[LayerSettings, ...]:
        """The settings of every layer."""
        return layer_models(self)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The layers with experts, counted from 0."""
        return tuple(i for i, layer in enumerate(self.by_layer) if layer.is_moe)

    @property
    def num_moe_layers(self) -> int:
        """N, layers with experts."""
        return len(self.moe_layers)

    @property
    def moe_settings(self) -> tuple[MoE, ...]:
        """The settings of every MoE layer, in order; empty in a dense model."""
        return tuple(layer.model.moe for layer in self.by_layer if layer.is_moe)

    @property
    def looks_ahead(self) -> str:
        """Says why the model cannot write or score text, in a sentence; empty if it can."""
        names = (moe.router for moe in self.moe_settings if not moe.route.causal)
        name = next(names, "")
        return name and (
            f"config.model.moe.router={name!r} looks at later tokens: the model cannot write text, "
            "and its loss on text is no measure of one that can, since the routing knows what is "
            "asked for; train one with a causal router, such as top_p, for that."
        )

    @property
    def cannot_write(self) -> str:
        """Says why the model cannot write text, in a sentence; empty if it can.

        Evaluation scores without what a transform drops; text is written as in training.
        """
        transforms = names_in(self.moe.transforms)
        causal = {
            name: transform.causal
            for name, transform in zip(transforms, chosen(self.moe, "transforms"), strict=True)
        }
        if self.looks_ahead or not self.num_moe_layers or all(causal.values()):
            return self.looks_ahead
        rest = ",".join(name for name in transforms if causal[name])
        return (
            f"config.model.moe.transforms={self.moe.transforms!r} drops choices of a token for the "
            "sake of later ones, which are not there while text is written; write with "
            f"--config.model.moe.transforms={rest!r}, which drops none for them."
        )

    @property
    def routers(self) -> tuple[Router, ...]:
        """The routers of the MoE layers, each once."""
        return tuple(dict.fromkeys(moe.route for moe in dict.fromkeys(self.moe_settings)))
