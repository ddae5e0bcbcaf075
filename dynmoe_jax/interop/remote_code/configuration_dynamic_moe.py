"""Settings of a Top-P mixture-of-experts decoder (arXiv 2403.07652)."""

from transformers import PretrainedConfig


class DynamicMoEConfig(PretrainedConfig):
    """As Llama's, with experts.

    Args:
      num_experts: experts of a layer that has them.
      top_p_threshold: a token adds experts until their probabilities pass this.
      norm_topk_prob: divide the weights of a token's experts by their sum.
      expert_frequency: layers 0, n, 2n, … have experts, the others are dense.
      intermediate_size: hidden width of a dense feed-forward.
      moe_intermediate_size: hidden width of one expert; None: as of a dense one.
    """

    model_type = "dynamic_moe"
    keys_to_ignore_at_inference = ("past_key_values",)

    def __init__(
        self,
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        moe_intermediate_size=None,
        num_hidden_layers=24,
        num_attention_heads=16,
        num_key_value_heads=None,
        head_dim=None,
        num_experts=16,
        top_p_threshold=0.4,
        norm_topk_prob=False,
        expert_frequency=1,
        hidden_act="silu",
        max_position_embeddings=2048,
        initializer_range=0.006,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        use_cache=True,
        **kwargs,
    ):
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.moe_intermediate_size = moe_intermediate_size or intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads or num_attention_heads
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.num_experts = num_experts
        self.top_p_threshold = top_p_threshold
        self.norm_topk_prob = norm_topk_prob
        self.expert_frequency = expert_frequency
        self.hidden_act = hidden_act
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.use_cache = use_cache
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
