"""A Top-P mixture-of-experts decoder in PyTorch (arXiv 2403.07652): plain, for use and reading.

Tensors have the names of the paper's released code.  A token takes its most probable experts, one
after another, while the probability before them is at most the threshold.

Shapes: B batch, L positions, T = B L tokens, D model width, E experts.
"""

import torch
from torch import nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_dynamic_moe import DynamicMoEConfig

# Since transformers 5.24, and before.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class RMSNorm(nn.Module):
    """Statistics in float32."""

    def __init__(self, width, epsilon):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x):
        """x over its root mean square, times the weight."""
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.epsilon)
        return self.weight * scaled.to(x.dtype)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, width, hidden):
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        """down(silu(gate x) * up x)."""
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class DenseFeedForward(nn.Module):
    """One feed-forward for all tokens, under the released code's name."""

    def __init__(self, config):
        super().__init__()
        self.mlp = FeedForward(config.hidden_size, config.intermediate_size)

    def forward(self, x):
        """The feed-forward of every token."""
        return self.mlp(x)


class TopPMixture(nn.Module):
    """Experts, of which a token takes as many as it needs."""

    def __init__(self, config):
        super().__init__()
        width, hidden = config.hidden_size, config.moe_intermediate_size
        self.router = nn.Linear(width, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(width, hidden) for _ in range(config.num_experts))
        self.threshold, self.renormalize = config.top_p_threshold, config.norm_topk_prob

    def weights(self, x):
        """[T, E]: weight of each expert, 0 for those that a token does not use."""
        logits = functional.linear(x.float(), self.router.weight.float())
        probabilities = logits.softmax(-1)
        values, order = probabilities.sort(dim=-1, descending=True, stable=True)
        mass = values.cumsum(-1)
        before = functional.pad(mass[:, :-1], (1, 0))
        values = values.masked_fill(before > self.threshold, 0.0)
        if self.renormalize:
            values = values / values.sum(-1, keepdim=True)
        return torch.zeros_like(probabilities).scatter(-1, order, values)

    def forward(self, x):
        """The weighted sum of the experts that each token chose."""
        tokens = x.reshape(-1, x.shape[-1])
        weights = self.weights(tokens)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            (chosen,) = weights[:, number].nonzero(as_tuple=True)
            if len(chosen):
                share = weights[chosen, number, None].to(x.dtype)
                output.index_add_(0, chosen, share * expert(tokens[chosen]))
        return output.reshape(x.shape)


def rotate(x, cos, sin):
    """Turns component i together with component i + W/2."""
    first, second = x.float().chunk(2, dim=-1)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return rotated.to(x.dtype)


class Attention(nn.Module):
    """Causal, with key/value heads that several query heads share."""

    def __init__(self, config, layer):
        super().__init__()
        width, head = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
        self.q_proj = nn.Linear(width, queries, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, keys, bias=False)
        self.o_proj = nn.Linear(queries, width, bias=False)
        self.head, self.layer = head, layer
        self.shared = config.num_attention_heads // config.num_key_value_heads

    def forward(self, x, allowed, cos, sin, cache):
        """Mixes values over the positions that are allowed, [B, 1, L, positions so far]."""

        def heads(projection):
            return projection(x).unflatten(-1, (-1, self.head)).transpose(1, 2)

        query, key = rotate(heads(self.q_proj), cos, sin), rotate(heads(self.k_proj), cos, sin)
        value = heads(self.v_proj)
        if cache is not None:
            key, value = cache.update(key, value, self.layer)
        key, value = (y.repeat_interleave(self.shared, dim=1) for y in (key, value))
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
        return self.o_proj(mixed.transpose(1, 2).flatten(-2))


class Layer(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        has_experts = layer % config.expert_frequency == 0
        self.mlp = TopPMixture(config) if has_experts else DenseFeedForward(config)

    def forward(self, x, *attention):
        """Both, each added to x."""
        x = x + self.self_attn(self.input_norm(x), *attention)
        return x + self.mlp(self.post_attention_norm(x))


class DynamicMoEPreTrainedModel(PreTrainedModel):
    """Base class of the model, with what transformers asks for."""

    config_class = DynamicMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ("Layer",)

    def _init_weights(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)


class MoEModel(DynamicMoEPreTrainedModel):
    """The decoder up to its last norm."""

    def __init__(self, config):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        cache=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        **kwargs,
    ):
        """Hidden states [B, L, D]; padding is where ``attention_mask`` [B, L so far] is 0."""
        cache = past_key_values if cache is None else cache
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = DynamicCache()
        past = 0 if cache is None else cache.get_seq_length()
        length = x.shape[1]
        to = torch.arange(past + length, device=x.device)
        here = to[past:]
        allowed = (to <= here[:, None])[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None]
            # A row of nothing would be NaN: padding sees itself.
            allowed = allowed | (to == here[:, None])
        if position_ids is None:
            position_ids = here[None]
            if attention_mask is not None:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, past:]
        half = self.config.head_dim // 2
        exponent = torch.arange(half, device=x.device, dtype=torch.float32) / half
        angle = position_ids[:, None, :, None].float() * self.config.rope_theta**-exponent
        cos, sin = angle.cos(), angle.sin()
        for layer in self.layers:
            x = layer(x, allowed, cos, sin, cache)
        return BaseModelOutputWithPast(self.norm(x), cache)


class MoEForCausalLM(DynamicMoEPreTrainedModel, GenerationMixin):
    """The decoder with its output projection."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config):
        super().__init__(config)
        self.model = MoEModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, **kwargs):
        """Logits [B, L, V]; with ``labels`` (-100: does not count) also the mean loss."""
        output = self.model(input_ids, **kwargs)
        logits = self.lm_head(output.last_hidden_state[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        return CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE: getattr(output, CACHE)})
