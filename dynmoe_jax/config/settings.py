"""Settings of a run; those of the model are in :mod:`.model`, those of kinds in their files.

:mod:`.tree` adds the groups of the registered kinds to them.
"""

import dataclasses
from typing import ClassVar

from dynmoe_jax import fields
from dynmoe_jax.config import rules
from dynmoe_jax.config.model import Model
from dynmoe_jax.config.parameter_groups import GROUPS, NOT
from dynmoe_jax.fields import free_setting, run_setting, walk
from dynmoe_jax.registry import (
    CORRUPTIONS,
    LOSSES,
    OBJECTIVES,
    REWEIGHTINGS,
    Registry,
    choice,
)


@dataclasses.dataclass(frozen=True)
class Loss:
    """Coefficients of the training loss (paper, section 3: alpha = 1e-2, beta = 1e-4)."""

    kinds: ClassVar[Registry] = LOSSES
    z_weight: float = free_setting(0.0, "of the output z-loss (PaLM uses 1e-4)", low=0.0)
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
        "comma-separated: python, text:GLOB, jsonl:GLOB, instructions:GLOB, parquet:GLOB, "
        "tfds:NAME, tasks:PART (instructions made on the spot)",
    )
    domain_weights: str = run_setting(
        "",
        "token shares by domain, e.g. 'code=2,prose=1' (0 leaves one out); 'proportional:cap=3000' "
        "mixes documents in proportion to a domain's number of them, but 3000 at most; empty = as "
        "it comes",
    )
    part: str = run_setting(
        "",
        "part of the training documents to read, dealt out by chance: '2/3' is the second of "
        "three; empty = all",
    )
    reweighting: str = choice(
        REWEIGHTINGS,
        "",
        "rule that moves the weights of domains after each evaluation; empty = they stay",
        optional=True,
        defines_model=False,
        fixed_in_run=True,
    )
    corruption: str = choice(
        CORRUPTIONS,
        "",
        "what training text is turned into, such as masked spans and their text; empty = it stays",
        optional=True,
        defines_model=False,
        fixed_in_run=True,
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
    objective: str = choice(
        OBJECTIVES,
        "language_model",
        "what training minimises",
        defines_model=False,
        fixed_in_run=True,
    )
    trainable: str = run_setting(
        "",
        f"what is trained: groups, as 'router,experts' (of {', '.join(GROUPS)}), or a regular "
        f"expression that finds dotted names of parameters; behind {NOT!r} stands what is not; "
        "empty = all",
    )
    init_from: str = run_setting(
        "",
        "folder of a run, trained or imported, whose model and tokenizer a new run begins with; "
        "empty = drawn at random",
    )
    grow: str = run_setting(
        "",
        "what becomes larger after which step, e.g. '500:width=256;800:num_layers=6'; the learning "
        "rate begins again with each part, and what is new rises in config.model.mask_steps",
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
    report: bool = free_setting(
        True,
        "analyze routing at the end, and draw report.html; metrics and summary are always there",
    )
    prompt: str = free_setting("The ", "text that the closing sample continues")
    sample_tokens: int = free_setting(
        64, "tokens sampled after the prompt; 0 = no sample", unit="tokens", low=0
    )
    temperature: float = free_setting(0.8, "of the closing sample; 0 = greedy", low=0.0)


@dataclasses.dataclass(frozen=True)
class Logging:
    """Outputs of metrics besides metrics.jsonl."""

    tensorboard: bool = free_setting(True, "write TensorBoard event files")
    wandb_project: str = free_setting("", "Weights & Biases project; empty = off (extra: wandb)")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run.

    Attributes:
      kept: (dotted path, JSON) of stored groups whose kinds are not imported; they stay as they
        are.
    """

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
    kept: tuple[tuple[str, str], ...] = dataclasses.field(default=(), repr=False, compare=False)

    def __post_init__(self):
        for path, field, value in walk(self):
            fields.check_value(path, field, value)
        rules.check_together(self)
