"""Prompts in, texts out.

Axis legend: n tokens written, N MoE layers, J members of an ensemble.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int

from dynmoe_jax import config
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.data.sources.document import well_formed
from dynmoe_jax.data.tokenizers.endings import ends_of
from dynmoe_jax.inference.ensemble.generate import Ensemble, EnsembleGenerator
from dynmoe_jax.inference.generate import Continuation, Generator
from dynmoe_jax.inference.pieces import Pieces, undecided
from dynmoe_jax.inference.sampling import MOST_BY_DEFAULT, Sampling
from dynmoe_jax.inference.stops import Stops
from dynmoe_jax.inference.transforms import without_later_tokens
from dynmoe_jax.model import Decoder


@dataclasses.dataclass(frozen=True)
class Written:
    """Text that the model wrote after a prompt.

    Attributes:
      prompt: the prompt.
      prompt_tokens: of the prompt, the one that begins a document included.
      text: the continuation.
      ids: its tokens, the one that ended it not included.
      pieces: the text that each token added.
      experts_nN: experts that each MoE layer used at the position from which each token was
        predicted; N = 0 in a dense model.
      ended: a stop token or a stop string came; otherwise it was cut at its length.
      posterior_nJ: of the members of an ensemble before each token; J = 0 of one model.
    """

    prompt: str
    prompt_tokens: int
    text: str
    ids: Int[np.ndarray, "n"]
    pieces: list[str]
    experts_nN: Int[np.ndarray, "n N"]
    ended: bool
    posterior_nJ: Float[np.ndarray, "n J"]

    @property
    def experts_n(self) -> list[float]:
        """Mean over the MoE layers of each token's experts; empty in a dense model."""
        return self.experts_nN.mean(axis=1).tolist() if self.experts_nN.shape[1] else []


class Writer:
    """Continues texts with one model, or an ensemble of several.

    Attributes:
      generator: which counts tokens and seconds.
    """

    def __init__(
        self,
        decoder: Decoder | Ensemble,
        tokenizer: Tokenizer,
        sampling: Sampling,
        stops: Sequence[str] = (),
        *,
        room: int = 0,
        copy_layers: bool = True,
        begin_with_bos: bool | None = None,
    ):
        """Prepares a model.

        Args:
          decoder: the model, or several.
          tokenizer: its tokenizer.
          sampling: how tokens are drawn.
          stops: strings that end a text; they are cut off it.  Special tokens may stand in them.
          room: positions of a prompt and its text; 0 = ``config.model.max_seq_len``.
          copy_layers: see :class:`Generator`.
          begin_with_bos: whether BOS stands before a prompt; None: as the tokenizer says.

        Raises:
          ConfigError: the router looks at later tokens.
        """
        if isinstance(decoder, Ensemble):
            self.generator = EnsembleGenerator(decoder, copy_layers=copy_layers)
        else:
            self.generator = Generator(without_later_tokens(decoder), copy_layers=copy_layers)
        self._room = room or self.generator.room
        self._tokenizer, self._sampling = tokenizer, sampling
        self._stops = Stops(stops, tokenizer)
        self._begin_with_bos = begin_with_bos
        if begin_with_bos is None:
            self._begin_with_bos = tokenizer.begins_with_bos

    def write(
        self,
        prompts: Sequence[str],
        samples: int = 1,
        on_text: Callable[[str], None] | None = None,
    ) -> list[list[Written]]:
        """Continues prompts together, with the text that each would get alone.

        Args:
          prompts: at least one.
          samples: texts for each prompt.
          on_text: told what the first text has grown by, every few tokens.

        Returns:
          the texts of each prompt.

        Raises:
          ConfigError: a prompt, or a prompt and ``max_tokens``, is longer than the model allows.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        limits = [self._limit(prompt) for prompt in ids]
        mark = self._stops.mark
        texts = [Pieces(self._tokenizer, prompt, mark) for prompt in ids for _ in range(samples)]
        watch = _Reader(texts, self._stops, on_text) if self._stops or on_text else None
        continuations = self.generator.write(
            ids,
            limits,
            self._sampling,
            vocab_size=self._tokenizer.vocab_size,
            stop_ids=ends_of(self._tokenizer),
            samples=samples,
            watch=watch,
        )
        written = [
            self._written(prompts[i // samples], ids[i // samples], texts[i], continuation)
            for i, continuation in enumerate(continuations)
        ]
        if on_text is not None:
            on_text(written[0].text[watch.told :])
        return [written[i : i + samples] for i in range(0, len(written), samples)]

    def check(self, prompt: str) -> None:
        """Raises ConfigError if the model has no room for the prompt and ``max_tokens``."""
        self._limit(self.encode(prompt))

    def encode(self, prompt: str) -> Int[np.ndarray, "_"]:
        """Token ids, behind BOS where it belongs, or where there is nothing else to begin with.

        Raises:
          ConfigError: the prompt has no encoding in UTF-8, and so no tokens.
        """
        if well_formed(prompt) != prompt:
            raise config.ConfigError(
                "The prompt holds a lone surrogate, which has no UTF-8 encoding; give text in "
                "UTF-8."
            )
        ids = self._tokenizer.encode(prompt)
        begin = [self._tokenizer.bos_id] if self._begin_with_bos or not len(ids) else []
        return np.array([*begin, *ids], np.int32)

    def _limit(self, prompt: Int[np.ndarray, "_"]) -> int:
        wanted = self._sampling.max_tokens
        left = self._room - len(prompt)
        if left < 1:
            raise config.ConfigError(
                f"a prompt of {len(prompt)} tokens leaves no room in the {self._room} positions of "
                f"the model (config.model.max_seq_len); shorten it by {1 - left} or more."
            )
        if wanted > left:
            raise config.ConfigError(
                f"--max_tokens={wanted} and a prompt of {len(prompt)} tokens are more than the "
                f"{self._room} positions of the model (config.model.max_seq_len); "
                f"lower it to {left}."
            )
        return wanted or min(left, MOST_BY_DEFAULT)

    def _written(self, prompt: str, ids, pieces: Pieces, continuation: Continuation) -> Written:
        pieces.add(continuation.ids[len(pieces.pieces) :])
        text, parts, ended = pieces.text, pieces.pieces, continuation.ended
        # The stop string may have come with the last tokens, which nobody has watched; or with
        # what is left of an unfinished character.
        end = self._stops.end(pieces.marked + text[len("".join(parts)) :])
        if end is not None:
            parts, ended = pieces.up_to(end), True
            text = "".join(parts)
        n = len(parts)
        written, experts_nN = continuation.ids[:n], continuation.experts_nN[:n]
        weights_nJ = continuation.posterior_nJ[:n]
        return Written(prompt, len(ids), text, written, parts, experts_nN, ended, weights_nJ)


class _Reader:
    """Reads along: ends texts at stop strings, and tells of the first one's growth."""

    def __init__(self, texts: list[Pieces], stops: Stops, on_text):
        self.texts, self.stops, self.on_text = texts, stops, on_text
        self.told = 0
        """Characters of the first text that were told."""

    def __call__(self, written: list[Continuation]) -> list[int]:
        ended = []
        for i, (pieces, continuation) in enumerate(zip(self.texts, written, strict=True)):
            pieces.add(continuation.ids[len(pieces.pieces) :])
            marked = pieces.marked
            end = self.stops.end(marked)
            if end is not None:
                ended.append(i)
            if i == 0 and self.on_text is not None:
                if end is None:
                    end = len(marked) - undecided(marked, self.stops.strings)
                text = "".join(pieces.up_to(end))
                self.on_text(text[self.told :])
                self.told = max(self.told, len(text))
        return ended
