"""One pass over text that adds up all that the analysis of routing needs.

Of tokens nothing is kept but sums, with bootstrap replicates over documents, and a choice of each
of the first tokens, which another checkpoint's are compared with.

Axis legend: B batch, L positions, T valid tokens of a batch, N MoE layers, E experts, V token ids
that have a place in tables, P positions, S classes of surprise, C numbers of experts, R replicates.
"""

import dataclasses

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from dynmoe_jax.data import Tokenizer
from dynmoe_jax.evaluation.routing.sums import Documents, GroupedMeans
from dynmoe_jax.evaluation.routing.words import Words

TOKEN_IDS = 8192
"""Token ids that have a place in the tables, the first ones that are met; frequent ones are."""

POSITIONS = 512
"""Positions that are told apart where the choice of an expert is compared with the position."""

WORD_PLACES = 5
"""Places in a word, the last one and later ones together."""

PLACES = 16
"""Parts of a row by which dropped choices are counted."""

SURPRISE_EDGES = np.concatenate([np.geomspace(1e-3, 0.5, 16), np.linspace(0.75, 12.25, 47)])
"""Borders in nats between classes of surprise."""

TOKENS_AT_ONCE = 1 << 14
"""Tokens of several batches that are counted together."""

_CLASSES = len(SURPRISE_EDGES) + 1
_MOST_COUNTS = 96
_LAYER_REPLICATES = 100


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TokenUse:
    """The use of experts by every token of a batch, as an evaluation step returns it.

    Attributes:
      nll_BL: loss in nats of the token that each position predicts.
      experts_NBL: experts that each token chose.
      first_NBL: the one with the largest weight, -1 where there is none.
      kept_NBL: experts left behind the transforms.
    """

    nll_BL: Float[Array, "B L"]
    experts_NBL: Int[Array, "N B L"]
    first_NBL: Int[Array, "N B L"]
    kept_NBL: Int[Array, "N B L"]


class RoutingSums:
    """Sums of one pass.

    Args:
      domains: names of the domains, in the order in which they are read.
      experts_N: experts of each MoE layer.
      slots_N: bound on the experts of a token in each.
      length: L, positions of a row.
      tokenizer: of the text.
    """

    def __init__(
        self,
        domains: list[str],
        experts_N: list[int],
        slots_N: list[int],
        length: int,
        tokenizer: Tokenizer,
    ):
        self.domains, self.experts_N, self.length = list(domains), list(experts_N), length
        self.words, self._bos = Words(tokenizer), tokenizer.bos_id
        layers, experts, spread = len(experts_N), max(experts_N), _CLASSES * _MOST_COUNTS
        self.layers, self.documents, self.tokens = layers, 0, 0
        self._least_N, self._most_N = np.full(layers, np.iinfo(np.int64).max), np.zeros(layers)
        self._pending: list[tuple[np.ndarray, ...]] = []
        self._domain = ""
        self.latest: tuple[np.ndarray, np.ndarray] = (np.zeros(0), np.zeros((layers, 0)))
        """Documents of the tokens of the batch before, and their first choices."""
        self.number_of_token: dict[int, int] = {}
        self.tokens_of_others = 0
        # ── Experts per token ──
        self.by_layer = GroupedMeans(layers)
        self.by_domain = GroupedMeans(len(self.domains) * layers)
        self.overall = GroupedMeans(1)
        self.of_domain = GroupedMeans(len(self.domains))
        self.by_token = GroupedMeans(min(TOKEN_IDS, tokenizer.vocab_size))
        self.by_position = GroupedMeans(_position_class(np.array([length - 1]))[0] + 1)
        self.by_word_place = GroupedMeans(WORD_PLACES)
        self.by_surprise = {which: GroupedMeans(_CLASSES) for which in ("predicted", "own")}
        self.surprise_S = {which: np.zeros(_CLASSES) for which in ("predicted", "own")}
        # ── How often a class of surprise meets a number of experts ──
        self.met = {which: GroupedMeans(spread) for which in ("predicted", "own")}
        self._columns = np.array([min(slots + 1, _MOST_COUNTS) for slots in slots_N])
        self._slots_N = np.array(slots_N)
        self.columns = int(self._columns.max())
        self.met_by_layer = GroupedMeans(layers * _CLASSES * self.columns, _LAYER_REPLICATES)
        # ── First choices ──
        positions = min(length, POSITIONS)
        self.first_NVE = np.zeros((layers, len(self.by_token.count_G), experts), np.int32)
        self.first_NPE = np.zeros((layers, positions, experts), np.int64)
        self.first_NDE = np.zeros((layers, len(self.domains), experts), np.int64)
        self.load_NDE = np.zeros((layers, len(self.domains), experts), np.int64)
        self.tokens_D = np.zeros(len(self.domains), np.int64)
        # ── Dropped choices ──
        self.chosen_P = np.zeros(min(PLACES, length), np.int64)
        self.kept_P = np.zeros(min(PLACES, length), np.int64)

    def add(self, domain: str, batch: dict[str, np.ndarray], use: TokenUse, load_NE) -> None:
        """Counts a batch; those of a domain follow each other, as do their documents.

        Args:
          domain: of the batch.
          batch: its arrays; see :mod:`dynmoe_jax.data.packing`.
          use: of its tokens.
          load_NE: tokens that chose each expert.
        """
        valid_BL = batch["segment_ids"] > 0
        token_T, position_T = batch["tokens"][valid_BL], batch["positions"][valid_BL]
        if not len(token_T):
            return
        places = len(self.kept_P)
        place_BL = np.broadcast_to(np.arange(self.length) * places // self.length, valid_BL.shape)
        number_T = self._documents(token_T, position_T)
        layers = (np.asarray(x_NBL)[:, valid_BL].astype(np.int64)
                  for x_NBL in (use.experts_NBL, use.first_NBL, use.kept_NBL))  # fmt: skip
        nll_T = np.asarray(use.nll_BL, np.float64)[valid_BL]
        part = number_T, token_T, position_T, place_BL[valid_BL], nll_T, *layers
        self.latest = number_T, part[-2]
        number = self.domains.index(domain)
        self.load_NDE[:, number] += np.asarray(load_NE).astype(np.int64)
        self.tokens_D[number] += len(token_T)
        self.tokens += len(token_T)
        if self._pending and self._domain != domain:
            self.flush()
        self._domain = domain
        self._pending.append(part)
        if sum(len(part[0]) for part in self._pending) >= TOKENS_AT_ONCE:
            self.flush()

    @property
    def load_NE(self) -> Int[np.ndarray, "N E"]:
        """Tokens that chose each expert."""
        return self.load_NDE.sum(axis=1)

    def flush(self) -> None:
        """Counts the batches that wait to be counted together, which is faster."""
        if not self._pending:
            return
        arrays = (np.concatenate(parts, axis=-1) for parts in zip(*self._pending, strict=True))
        number_T, token_T, position_T, place_T, nll_T, experts_NT, first_NT, kept_NT = arrays
        self._pending = []
        self._least_N = np.minimum(self._least_N, experts_NT.min(axis=1))
        self._most_N = np.maximum(self._most_N, experts_NT.max(axis=1))
        documents, domain = Documents.numbered(number_T), self.domains.index(self._domain)
        self._means(documents, domain, token_T, position_T, experts_NT)
        self._surprise(documents, position_T, nll_T, experts_NT)
        self._firsts(domain, token_T, position_T, first_NT)
        for total_P, count_NT in ((self.chosen_P, experts_NT), (self.kept_P, kept_NT)):
            count_P = np.bincount(place_T, count_NT.sum(axis=0), len(total_P))
            total_P += count_P.astype(np.int64)

    @property
    def fixed(self) -> bool:
        """Whether in every layer all tokens used as many experts."""
        return bool(np.all(self._least_N == self._most_N))

    def _documents(self, token_T, position_T) -> np.ndarray:
        """Numbers of the tokens' documents in all that was read."""
        # A document that goes on in the next row begins anew there, but not with BOS.
        begins_T = (position_T == 0) & (token_T == self._bos)
        number_T = self.documents - 1 + np.cumsum(begins_T)
        number_T = np.maximum(number_T, 0)
        self.documents = int(number_T[-1]) + 1
        return number_T

    def _means(self, documents, domain, token_T, position_T, experts_NT) -> None:
        mean_T = experts_NT.mean(axis=0)
        same_T = np.zeros(len(token_T), np.int64)
        self.overall.add(documents, same_T, mean_T)
        self.of_domain.add(documents, same_T + domain, mean_T)
        layer_S, experts_S = np.repeat(np.arange(self.layers), len(token_T)), experts_NT.reshape(-1)
        repeated = documents.repeated(self.layers)
        self.by_layer.add(repeated, layer_S, experts_S)
        self.by_domain.add(repeated, domain * self.layers + layer_S, experts_S)
        self.by_token.add(documents, self._numbers(token_T), mean_T)
        self.by_position.add(documents, _position_class(position_T), mean_T)
        place_T = self.words.places(token_T, position_T == 0)
        self.by_word_place.add(documents, np.minimum(place_T, WORD_PLACES - 1), mean_T)

    def _numbers(self, token_T) -> np.ndarray:
        """The place of each token id in the tables; -1 for those that found none."""
        known = self.number_of_token
        for token in dict.fromkeys(token_T.tolist()):
            if token not in known and len(known) < len(self.by_token.count_G):
                known[token] = len(known)
        ids, inverse_T = np.unique(token_T, return_inverse=True)
        return np.array([known.get(int(token), -1) for token in ids])[inverse_T]

    def _surprise(self, documents, position_T, nll_T, experts_NT) -> None:
        total_T = experts_NT.sum(axis=0)
        most = int(self._slots_N.sum())
        column_T = total_T if most < _MOST_COUNTS else total_T * (_MOST_COUNTS - 1) // most
        # The loss of a token stands where it was predicted, one position before it.
        own_T = np.concatenate([[0.0], nll_T[:-1]])
        for which, surprise_T, known_T in (
            ("predicted", nll_T, np.ones(len(nll_T), bool)),
            ("own", own_T, position_T > 0),
        ):
            class_T = np.searchsorted(SURPRISE_EDGES, surprise_T)
            group_T = np.where(known_T, class_T, -1)
            self.by_surprise[which].add(documents, group_T, experts_NT.mean(axis=0))
            self.surprise_S[which] += np.bincount(
                class_T[known_T], surprise_T[known_T], minlength=_CLASSES
            )
            cell_T = np.where(known_T, class_T * _MOST_COUNTS + column_T, -1)
            self.met[which].add(documents, cell_T)
            if which == "predicted":
                cells = []
                for layer, experts_T in enumerate(experts_NT):
                    most = self._slots_N[layer]
                    last = self._columns[layer] - 1
                    column = experts_T if most <= last else experts_T * last // most
                    cells.append((layer * _CLASSES + class_T) * self.columns + column)
                self.met_by_layer.add(documents.repeated(self.layers), np.concatenate(cells))

    def _firsts(self, domain, token_T, position_T, first_NT) -> None:
        number_T = self._numbers(token_T)
        self.tokens_of_others += int(np.sum(number_T < 0))
        for layer, first_T in enumerate(first_NT):
            for table_XE, class_T in (
                (self.first_NVE[layer], number_T),
                (self.first_NPE[layer], np.where(position_T < POSITIONS, position_T, -1)),
                (self.first_NDE[layer], np.full(len(token_T), domain)),
            ):
                known_T = (first_T >= 0) & (class_T >= 0)
                experts = table_XE.shape[1]
                cell_T = class_T[known_T] * experts + first_T[known_T]
                counts = np.bincount(cell_T, minlength=table_XE.size).reshape(table_XE.shape)
                table_XE += counts.astype(table_XE.dtype)


def _position_class(position_T) -> np.ndarray:
    """0, 1, 2 to 3, 4 to 7, …: the number of binary digits."""
    return np.ceil(np.log2(np.asarray(position_T) + 1)).astype(np.int64)


def position_range(number: int) -> tuple[int, int]:
    """First and last position of a class."""
    return (0, 0) if number == 0 else (2 ** (number - 1), 2**number - 1)
