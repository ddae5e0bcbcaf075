"""Token ids in, token ids out.

Axis legend: B prompts, P slots of the prompts, S sequences, M tokens to write at most, n tokens
written, N MoE layers, J members of an ensemble.
"""

import dataclasses
import time
from collections.abc import Callable, Collection, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float, Int

from dynmoe_jax.config import ConfigError
from dynmoe_jax.data import check_ids
from dynmoe_jax.hardware.target import current_target
from dynmoe_jax.inference.decoding import DecodeState, decode, prefill_prompts, split_layers
from dynmoe_jax.inference.sampling import Draw, Sampling, sequence_keys
from dynmoe_jax.model import Decoder

CHUNK = 4
"""Tokens between two looks at what is being written."""


@dataclasses.dataclass(frozen=True)
class Continuation:
    """Continuation of a prompt.

    Attributes:
      ids: token ids, the token that ended it (if one did) not included.
      experts_nN: experts that each MoE layer used at the position from which each token was
        predicted; N = 0 in a dense model.
      ended: a stop token came, or whoever watched said so; otherwise the limit was reached.
      posterior_nJ: of the members of an ensemble, before each token; J = 0 of one model.
    """

    ids: Int[np.ndarray, "n"]
    experts_nN: Int[np.ndarray, "n N"]
    ended: bool
    posterior_nJ: Float[np.ndarray, "n J"]


@dataclasses.dataclass
class Speed:
    """Speed of a generator so far.  Seconds of computing do not count those of compiling."""

    prompt_tokens: int = 0
    prompt_s: float = 0.0
    written_tokens: int = 0
    writing_s: float = 0.0
    compile_s: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens written a second; NaN if there are none."""
        return self.written_tokens / self.writing_s if self.writing_s else np.nan


Watch = Callable[[list[Continuation]], Collection[int]]
"""Sees all sequences as they are so far; returns the numbers of those that are to end now."""


class Generator:
    """Continues prompts with one decoder.

    Programs are compiled once for each size of a batch, whose prompts and limits are rounded up.

    Attributes:
      room: positions of a prompt and its text.
      speed: adds up over all calls.
    """

    _prefill, _decode = staticmethod(prefill_prompts), staticmethod(decode)
    _weighing: tuple = ()
    """Arguments of both programs behind how tokens are drawn."""

    def __init__(self, decoder: Decoder, *, copy_layers: bool = True):
        """Prepares a decoder.

        Args:
          decoder: the model.
          copy_layers: hold the layers' parameters a second time, in the form that decodes fastest
            (see :mod:`dynmoe_jax.model.kv_cache`).  Without, programs compile sooner, run slower.

        Raises:
          ConfigError: the router, or a transform of its choices, looks at later tokens.
        """
        if decoder.config.cannot_write:
            raise ConfigError(decoder.config.cannot_write)
        self._structure, self._params = nnx.split(decoder)
        self._rows, self.room = decoder.config.vocab_size, decoder.config.max_seq_len
        self._whole = on_every_device(self._params)
        self._layers = split_layers(self._structure, self._params) if copy_layers else None
        self._compiled: dict = {}
        self.speed = Speed()

    def write(
        self,
        prompts: Sequence[Sequence[int] | Int[np.ndarray, "_"]],
        limits: Sequence[int],
        sampling: Sampling,
        *,
        vocab_size: int,
        stop_ids: Sequence[int],
        samples: int = 1,
        watch: Watch | None = None,
    ) -> list[Continuation]:
        """Continues prompts together; each gets the text that it would get alone.

        Args:
          prompts: token ids of each, at least one.
          limits: tokens that each prompt's sequences may have, at least one.
          sampling: how tokens are drawn; ``max_tokens`` is not looked at.
          vocab_size: the tokenizer's; a model may have more rows, which mean nothing.
          stop_ids: tokens that end a sequence.
          samples: sequences for each prompt.
          watch: called after the first token and every ``CHUNK`` more.  Without it the host is not
            asked until all sequences have ended.

        Returns:
          the sequences, those of a prompt side by side.

        Raises:
          DataError: the model has no embedding of a token.
        """
        for prompt in prompts:
            check_ids(prompt, self._rows)
        draw = Draw.of(sampling, vocab_size, stop_ids)
        watched = _Watched(np.repeat(limits, samples), stop_ids, watch)
        state = self._begin(prompts, watched.limits, sampling.seed, draw, samples)
        begun = time.perf_counter()
        end, until = int(max(limits)), 1
        while until < end and watched.look(state):
            until = end if watch is None else min(end, until + CHUNK)
            state = watched.without_ended(state)
            model = self._params, self._layers
            arguments = *model, state, draw, *self._weighing, jnp.int32(until)
            compiled, compile_s = self._program(self._decode, *arguments)
            begun += compile_s
            state = jax.block_until_ready(compiled(*arguments))
        watched.look(state)
        self.speed.writing_s += time.perf_counter() - begun
        # The first token of each sequence came with the prompt.
        self.speed.written_tokens += sum(max(0, len(c.ids) - 1) for c in watched.written)
        return watched.written

    def _begin(self, prompts, limits, seed: int, draw: Draw, samples: int) -> DecodeState:
        """The prompts read, one token of each sequence drawn."""
        lengths = [len(prompt) for prompt in prompts]
        rows = 2 ** (len(prompts) - 1).bit_length()
        width = rounded_up(max(lengths), current_target().platform)
        tokens_BP = np.zeros((rows, width), np.int32)
        start_B = np.full(rows, width, np.int32)
        for row, prompt in enumerate(prompts):
            start_B[row] = width - len(prompt)
            tokens_BP[row, start_B[row] :] = prompt
        limit_S = np.ones(rows * samples, np.int32)
        limit_S[: len(limits)] = limits
        nobody = [np.zeros(0, np.int32)] * (rows - len(prompts))
        key_S = sequence_keys(seed, [*prompts, *nobody], samples)
        sequences = tokens_BP, start_B, limit_S, key_S
        arguments = self._params, *sequences, draw, *self._weighing
        compiled, _ = self._program(
            self._prefill,
            *arguments,
            room=rounded_up(int(max(limits)), "cpu"),
            samples=samples,
            in_scan=self._layers is None,
        )
        begun = time.perf_counter()
        state = jax.block_until_ready(compiled(*arguments))
        self.speed.prompt_s += time.perf_counter() - begun
        self.speed.prompt_tokens += sum(lengths)
        return state

    def _program(self, function, *arguments, **static):
        """(the compiled program for arguments like these, seconds that compiling it took now)."""
        begun = time.perf_counter()
        shapes = [(a.shape, a.dtype) for a in jax.tree.leaves(arguments[1:])]
        key = function, tuple(shapes), tuple(static.items())
        if key in self._compiled:
            return self._compiled[key], 0.0
        if self._whole is not None:
            # Over a mesh the compiler would choose how results are split, and a host that sees a
            # part of the mesh could not read them.
            names = ("structure", *static)
            function = jax.jit(function, static_argnames=names, out_shardings=self._whole)
        compiled = function.lower(self._structure, *arguments, **static).compile()
        self._compiled[key] = compiled
        seconds = time.perf_counter() - begun
        self.speed.compile_s += seconds
        return compiled, seconds


class _Watched:
    """The sequences as the host sees them."""

    def __init__(self, limits: Int[np.ndarray, "S"], stop_ids: Sequence[int], watch: Watch | None):
        self.limits, self.stop_ids, self.watch = limits, np.asarray(stop_ids), watch
        self.ends: dict[int, int] = {}
        """Tokens of the sequences that ended before their limits."""
        self.written: list[Continuation] = []

    def look(self, state: DecodeState) -> bool:
        """Reads what there is; returns whether anything is left to write."""
        drawn = int(state.drawn)
        kept = state.tokens_SM, state.experts_SMN, state.posterior_SMJ
        tokens_SM, experts_SMN, posterior_SMJ = jax.device_get(kept)
        self.written = []
        for row, limit in enumerate(self.limits):
            end = self.ends.get(row, min(drawn, int(limit)))
            stops = np.flatnonzero(np.isin(tokens_SM[row, :end], self.stop_ids))
            if stops.size:
                end = self.ends[row] = int(stops[0])
            ids, experts_nN = tokens_SM[row, :end], experts_SMN[row, :end]
            posterior_nJ = posterior_SMJ[row, :end]
            self.written.append(Continuation(ids, experts_nN, row in self.ends, posterior_nJ))
        if self.watch is not None:
            for row in self.watch(self.written):
                self.ends.setdefault(row, len(self.written[row].ids))
                self.written[row] = dataclasses.replace(self.written[row], ended=True)
        return any(row not in self.ends and drawn < n for row, n in enumerate(self.limits))

    def without_ended(self, state: DecodeState) -> DecodeState:
        """Marks sequences that the host stopped as inactive on the device."""
        if self.watch is None or not self.ends:
            return state
        ended_S = np.isin(np.arange(state.active_S.shape[0]), list(self.ends))
        return dataclasses.replace(state, active_S=state.active_S & ~ended_S)


def on_every_device(params: nnx.State) -> jax.sharding.NamedSharding | None:
    """The sharding of what lies whole on every device of the parameters' mesh, if they have one."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or sharding.mesh.size == 1:
        return None
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())


def rounded_up(length: int, platform: str) -> int:
    """A power of two, or one and a half of one, so that few sizes are compiled.

    At least 32; on accelerators a multiple of 128, the least that Splash attention takes.
    """
    least = 32 if platform == "cpu" else 128
    size = least
    while size < length:
        size = size // 2 * 3 if size & (size - 1) == 0 else size // 3 * 4
    return -(-size // least) * least if platform != "cpu" else size
