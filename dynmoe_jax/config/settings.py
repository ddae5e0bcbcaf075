"""Every setting of a run: its default, its unit, its check. The only home of defaults.

A config file (``configs/*.py``) starts from :class:`Config`, changes fields with
:func:`dataclasses.replace`, and returns :func:`to_config_dict` of it, so that any setting can be
overridden on the command line (``--config.model.num_layers=8``).  :func:`from_config_dict` turns
the edited dictionary back into a checked :class:`Config`; everything else in the package reads the
frozen dataclass.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections

from dynmoe_jax import fields
from dynmoe_jax.config import rules
from dynmoe_jax.fields import ConfigError, free_setting, model_setting, run_setting, setting, walk


@dataclasses.dataclass(frozen=True)
class MoE:
    """The Mixture-of-Experts feed-forward: who is chosen, and how the chosen are computed."""

    router: str = model_setting(
        "top_p", "how a token chooses its experts", choices=("top_p", "top_k")
    )
    num_experts: int = model_setting(16, "routed experts per MoE layer", low=1)
    hidden_width: int = model_setting(2816, "hidden width of one expert", unit="units", low=1)
    top_p: float = model_setting(
        0.4, "a token adds experts until their probabilities pass this", above=0.0, high=1.0
    )
    top_k: int = model_setting(2, "experts per token of the top_k router", unit="experts", low=1)
    renormalize: bool = model_setting(
        False, "divide the combine weights by their sum (the paper does not)"
    )
    routed_scale: float = model_setting(
        1.0, "the routed experts' output is multiplied by this (DeepSeek-V2)", above=0.0
    )
    shared_hidden_width: int = model_setting(
        0, "hidden width of the expert that every token uses besides; 0 = none", unit="units", low=0
    )
    shared_gate: bool = model_setting(
        False, "weigh the shared expert by a sigmoid of the token (Qwen2-MoE)"
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
    rows_per_token: float = free_setting(
        0.0,
        "bound on the mean experts per token of a batch, whose least probable choices are then "
        "dropped (so tokens affect each other); 0 = none, nothing is dropped",
        unit="rows/token",
        low=0.0,
    )
    saved_rows_per_token: float = free_setting(
        -1.0,
        "rows whose hidden activations are kept for backward, others are recomputed (TPU kernels "
        "that fuse SwiGLU keep none); -1 = k of top_k, 2 of top_p",
        unit="rows/token",
        low=-1.0,
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


@dataclasses.dataclass(frozen=True)
class Model:
    """A Llama-style decoder.  The defaults are the paper's 24-layer model."""

    num_layers: int = model_setting(24, "decoder layers", low=1)
    width: int = model_setting(1024, "width of the residual stream", unit="units", low=1)
    num_heads: int = model_setting(16, "query heads", low=1)
    num_kv_heads: int = model_setting(16, "key/value heads; must divide num_heads", low=1)
    head_width: int = model_setting(64, "width of one head; even, for RoPE", unit="units", low=2)
    hidden_width: int = model_setting(
        2816, "hidden width of a dense feed-forward", unit="units", low=1
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
    unroll: int = free_setting(
        0,
        "layers (groups of them, where every n-th is MoE) that the loop over layers takes at a "
        "time; 0 = by platform, see docs/design.md",
        low=0,
    )
    moe: MoE = dataclasses.field(default_factory=MoE)

    @property
    def num_groups(self) -> int:
        """Scanned groups of layers, each with one MoE layer unless the model is dense."""
        return (self.num_layers - self.moe.dense_first_layers) // (self.moe.every_n_layers or 1)

    @property
    def moe_layers(self) -> range:
        """The layers with experts, counted from 0; the only place that says which."""
        first, every = self.moe.dense_first_layers + self.moe.layer_offset, self.moe.every_n_layers
        return range(first, self.num_layers, every) if every else range(0)

    @property
    def num_moe_layers(self) -> int:
        """N, layers with experts."""
        return len(self.moe_layers)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Coefficients of the training loss (paper, section 3: alpha = 1e-2, beta = 1e-4)."""

    balance_weight: float = free_setting(1e-2, "of the load-balance loss (alpha)", low=0.0)
    balance_counts: str = free_setting(
        "sum",
        "choices that the load-balance loss counts: all, all over their number, or first ones",
        choices=("sum", "per_choice", "first_choice_only"),
    )
    entropy_weight: float = free_setting(1e-4, "of the router-entropy loss (beta)", low=0.0)
    router_z_weight: float = free_setting(0.0, "of the router z-loss (ST-MoE uses 1e-3)", low=0.0)
    z_weight: float = free_setting(0.0, "of the output z-loss (PaLM uses 1e-4)", low=0.0)
    balance_over: str = free_setting(
        "batch",
        "what the load-balance loss asks to be balanced; with config.train.microbatches > 1 the "
        "whole batch takes one more forward pass",
        choices=("batch", "microbatch"),
    )
    chunk_tokens: int = free_setting(
        2048,
        "tokens whose logits exist at one time on one device; of the kernels on TPU, which keep "
        "nothing but the logits' gradients, four times as many",
        unit="tokens",
        low=1,
    )


@dataclasses.dataclass(frozen=True)
class Data:
    """Sources of text, and how it becomes batches."""

    sources: str = free_setting(
        "python",
        "comma-separated: python, text:GLOB, jsonl:GLOB, parquet:GLOB, tfds:NAME",
    )
    domain_weights: str = run_setting(
        "",
        "token shares by domain, e.g. 'code=2,prose=1' (0 leaves one out); empty = as it comes",
    )
    seq_len: int = run_setting(2048, "tokens of one training sequence", unit="tokens", low=2)
    text_field: str = run_setting(
        "text", "field of a JSONL, Parquet or TFDS record with the text; dots reach into records"
    )
    domain_field: str = run_setting(
        "domain", "field with the domain; where it is missing, the file's name stands in"
    )
    max_megabytes: float = run_setting(
        0.0, "cap on the text kept per domain, chosen evenly; 0 = all", unit="MB", low=0.0
    )
    heldout_fraction: float = run_setting(
        0.02, "share of documents held out for evaluation", above=0.0, high=0.5
    )
    max_broken_fraction: float = free_setting(
        0.01, "preparation fails if more than this share of records is broken", low=0.0, high=1.0
    )
    tokenizer: str = free_setting(
        "",
        "a SentencePiece .model, or a folder in Hugging Face's format; empty = train one here",
    )
    tokenizer_megabytes: float = free_setting(
        8.0, "text a new tokenizer is trained on", unit="MB", above=0.0
    )
    directory: str = free_setting("", "where prepared data is kept; empty = WORKDIR/data")
    shuffle_tokens: int = run_setting(
        2**20, "packed text shuffled together, over all shards", unit="tokens", low=0
    )
    virtual_shards: int = run_setting(
        8,
        "independent streams the data is cut into, whatever the number of hosts",
        low=1,
        high=4096,
    )


@dataclasses.dataclass(frozen=True)
class Train:
    """The length and rhythm of training."""

    steps: int = free_setting(1000, "optimizer steps", unit="steps", low=1)
    batch_size: int = run_setting(32, "sequences per optimizer step", unit="sequences", low=1)
    microbatches: int = free_setting(
        1, "parts of a batch whose gradients are added up (gradient accumulation)", low=1
    )
    log_every_steps: int = free_setting(
        10, "steps between lines of metrics.jsonl", unit="steps", low=1
    )
    max_skipped_in_a_row: int = free_setting(
        10, "updates in a row skipped as not finite, after which the run stops", low=1
    )
    spike_action: str = free_setting(
        "warn",
        "after a spike of the loss: nothing, a warning, or back to the checkpoint before it and "
        "past the batches that made it",
        choices=("none", "warn", "rollback"),
    )
    spike_deviations: float = free_setting(
        6.0, "robust standard deviations above the median loss that are too many", above=0.0
    )
    spike_steps: int = free_setting(
        3, "steps in a row with such a loss that make a spike", unit="steps", low=1
    )
    collapse_steps: int = free_setting(
        500,
        "steps of unused experts, or of as many or few experts per token as can be, that a "
        "warning waits for; 0 = no warning",
        unit="steps",
        low=0,
    )
    init_from: str = run_setting(
        "",
        "folder of a run, trained or imported, whose model and tokenizer a new run begins with; "
        "empty = drawn at random",
    )
    compilation_cache: str = free_setting(
        "", "folder of compiled programs, for the next start; empty = WORKDIR/compiled, none = off"
    )


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """AdamW; weight decay on matrices only."""

    learning_rate: float = free_setting(3e-4, "peak learning rate", above=0.0)
    schedule: str = free_setting(
        "warmup_cosine",
        "shape of the learning rate",
        choices=("warmup_cosine", "warmup_stable_decay", "constant"),
    )
    warmup_steps: int = free_setting(100, "steps of linear warm-up", unit="steps", low=0)
    decay_fraction: float = free_setting(
        0.2, "last share of training that warmup_stable_decay decays in", above=0.0, high=1.0
    )
    final_fraction: float = free_setting(
        0.1, "final learning rate as a share of the peak", low=0.0, high=1.0
    )
    b1: float = free_setting(0.9, "decay of the first moment", low=0.0, high=0.9999)
    b2: float = free_setting(0.95, "decay of the second moment", low=0.0, high=0.999999)
    epsilon: float = free_setting(1e-8, "added to the root of the second moment", above=0.0)
    weight_decay: float = free_setting(0.1, "decoupled decay of matrices", low=0.0)
    clip_norm: float = free_setting(1.0, "global gradient norm above which it is scaled", above=0.0)


@dataclasses.dataclass(frozen=True)
class Mesh:
    """Devices along each mesh axis; -1 takes what the others leave."""

    slice: int = free_setting(
        1,
        "copies of the run that share the batch over a data-centre network (TPU slices, or hosts)",
        unit="slices",
        low=-1,
    )
    data: int = free_setting(-1, "batch, and width of parameters (FSDP)", unit="devices", low=-1)
    expert: int = free_setting(
        1, "experts (expert parallelism); batch for everything else", unit="devices", low=-1
    )
    model: int = free_setting(
        1, "heads, hidden width, vocabulary (tensor parallelism)", unit="devices", low=-1
    )


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Checkpoints on disk: when one is written, and which ones are kept."""

    every_steps: int = free_setting(
        1000, "steps between checkpoints; 0 = only by time", unit="steps", low=0
    )
    every_minutes: float = free_setting(
        0.0, "minutes between checkpoints, besides; 0 = only by steps", unit="minutes", low=0.0
    )
    keep: int = free_setting(2, "newest checkpoints kept", low=1)
    keep_best: int = free_setting(0, "checkpoints of the lowest held-out loss kept besides", low=0)
    keep_every_steps: int = free_setting(
        0, "one checkpoint of so many steps is kept for good; 0 = none", unit="steps", low=0
    )
    keep_every_hours: float = free_setting(
        0.0, "one checkpoint of so many hours is kept for good; 0 = none", unit="hours", low=0.0
    )
    verify: bool = free_setting(
        True, "compare a checkpoint with its checksums before continuing it"
    )


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Held-out evaluation and the sample at the end."""

    every_steps: int = free_setting(0, "steps between evaluations; 0 = only at the end", low=0)
    max_batches: int = free_setting(
        50, "held-out batches per domain at most", unit="batches", low=1
    )
    prompt: str = free_setting("The ", "text that the closing sample continues")
    sample_tokens: int = free_setting(64, "tokens sampled after the prompt", unit="tokens", low=1)
    temperature: float = free_setting(0.8, "of the closing sample; 0 = greedy", low=0.0)


@dataclasses.dataclass(frozen=True)
class Logging:
    """Outputs of metrics besides metrics.jsonl."""

    tensorboard: bool = free_setting(True, "write TensorBoard event files")
    wandb_project: str = free_setting("", "Weights & Biases project; empty = off (extra: wandb)")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = run_setting(0, "of initialisation, data order and sampling", low=0, high=2**31 - 1)
    model: Model = dataclasses.field(default_factory=Model)
    loss: Loss = dataclasses.field(default_factory=Loss)
    data: Data = dataclasses.field(default_factory=Data)
    train: Train = dataclasses.field(default_factory=Train)
    optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
    evaluation: Evaluation = dataclasses.field(default_factory=Evaluation)
    logging: Logging = dataclasses.field(default_factory=Logging)

    def __post_init__(self):
        for path, field, value in walk(self):
            fields.check_value(path, field, value)
        rules.check_together(self)


def nearest_name(name: str) -> str:
    """The existing setting, or group of settings, whose dotted path is most like ``name``."""
    return fields.nearest_name(Config, name)


def unknown_setting(name: str) -> ConfigError:
    """The error for a setting that does not exist."""
    return fields.unknown_setting(Config, name)


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as nested plain dictionaries (JSON-able)."""
    return dataclasses.asdict(config)


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """Returns what a config file returns: the settings, open to overrides from the command line."""
    return ml_collections.ConfigDict(to_dict(config))


def from_config_dict(settings: Mapping[str, Any]) -> Config:
    """Builds the checked Config from nested dictionaries.

    Raises:
      ConfigError: a name does not exist, or a value has the wrong type or is out of range.
    """
    if isinstance(settings, ml_collections.ConfigDict):
        settings = settings.to_dict()
    return fields.build(Config, settings)


def differences(config: Config) -> list[tuple[str, Any, Any]]:
    """(dotted path, value, default) of every setting that differs from its default."""
    defaults = {path: value for path, _, value in walk(Config())}
    return [(p, v, defaults[p]) for p, _, v in walk(config) if v != defaults[p]]
