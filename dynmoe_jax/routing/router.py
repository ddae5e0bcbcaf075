"""Interface of routers, and their registry.

Axis legend: T tokens, E experts, K slots per token, D model width, N MoE layers of one router.
"""

import abc
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt32

from dynmoe_jax.routing.record import ExpertSlots, Routing, SoftSlots

READABLE = frozenset({"noise", "previous_logits", "segments", "step", "token_ids"})
"""All that a router may read by naming it in ``reads``; regularizers all but the logits before, and
losses ``"segments"``, ``"token_ids"`` and, with parameters of experts, ``"noise"``."""

OUTPUTS = "outputs"
"""What a loss needs that reads :attr:`RouterInput.output`; every kind of expert gives it."""

Params = Mapping[str, Array]
"""Parameters or state of a router, by name."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Experts per token that a router uses, as those who lay out memory or plan need to know.

    Attributes:
      slots: K, the smallest provable bound for one token.
      fewest: experts that a token uses at the least, in training.
      expected: the mean to expect of a trained model, for transports and plans.
      usual_rows: the mean that memory is laid out for; more than it is computed, but slower.
    """

    slots: int
    fewest: int
    expected: float
    usual_rows: float


@dataclasses.dataclass(frozen=True)
class Parameter:
    """Declaration of a parameter; its name ends in its axes, so that sharding follows.

    Attributes:
      shape: of one layer's array.
      init: ``"normal"`` (as every matrix of the model), ``"zeros"``, ``"ones"``, or a function of
        (key, shape).
      decay: whether weight decay applies.
    """

    shape: tuple[int, ...]
    init: str | Callable[[Array, tuple[int, ...]], Array] = "normal"
    decay: bool = True


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RouterInput:
    """All that a router may look at.

    Attributes:
      x_TD: tokens, normed.
      logits_TE: router logits of the layer, or those of :attr:`Router.logits`.
      valid_T: False for padding, which must get no expert.
      state: of the router in this layer; see :meth:`Router.initial_state`.
      key_T: a key of each token, for noise: a function of seed, step, layer, row of the batch and
        position.  None in inference, and unless the router reads ``"noise"``.
      layer_key: a key of seed, step and layer, for losses of parameters of experts that read
        ``"noise"``; None otherwise.
      output: (number of an expert) -> what it gives all tokens, [T, D], for losses that need
        :data:`OUTPUTS`; None otherwise.
      token_id_T: None unless the router reads ``"token_ids"``.
      segment_id_T: document of each token, within its sequence; 0: padding.  None unless the router
        or a loss reads ``"segments"``.
      cache: of the sequences' earlier tokens while generating, see :meth:`Router.initial_cache`;
        empty where sequences are there from their first token.
      previous_logits_TE: of the MoE layer before, as its :attr:`Routing.logits_TE`; zeros in the
        first one.  Experts stand in the places of those with their numbers, free ones in those as
        far from the last; where that layer has no such one, there are zeros.  None unless the
        router reads ``"previous_logits"``.
      run_key: a key of the layer, the same in all steps: a function of seed and layer.  Like
        ``step``, None in inference, and unless the router reads ``"step"``.
      step: number of the training step.
      expected: experts per token that the router aims at, see :class:`Bounds`.
      length: L, tokens of one sequence; sequences follow each other in T.
      num_experts: E; a router may score more than the experts.
      training: False when evaluating or generating.
    """

    x_TD: Float[Array, "T D"] | None
    logits_TE: Float[Array, "T E"]
    valid_T: Bool[Array, "T"]
    state: Params = dataclasses.field(default_factory=dict)
    key_T: UInt32[Array, "T 2"] | None = None
    layer_key: UInt32[Array, "2"] | None = None
    output: Callable[[Int[Array, ""]], Float[Array, "T D"]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    token_id_T: Int[Array, "T"] | None = None
    segment_id_T: Int[Array, "T"] | None = None
    cache: Params = dataclasses.field(default_factory=dict)
    previous_logits_TE: Float[Array, "T E"] | None = None
    run_key: UInt32[Array, "2"] | None = None
    step: Int[Array, ""] | None = None
    expected: float = dataclasses.field(default=1.0, metadata={"static": True})
    length: int = dataclasses.field(default=0, metadata={"static": True})
    num_experts: int = dataclasses.field(default=0, metadata={"static": True})
    training: bool = dataclasses.field(default=False, metadata={"static": True})

    def draws(self, draw: Callable[[Array], Array], purpose: int = 0) -> Array:
        """Random numbers of each token, ``draw(key)`` for every token's own key.

        Args:
          draw: such as ``lambda key: jax.random.normal(key, (E,))``.
          purpose: tells several draws of one router from each other.
        """

        def of_token(key):
            return draw(jax.random.fold_in(jax.random.wrap_key_data(key), purpose))

        return jax.vmap(of_token)(self.key_T)

    def held_key(self, interval: int, purpose: int = 0) -> Array:
        """A key of the layer that stays for ``interval`` steps, for draws that all tokens share.

        Args:
          interval: steps.
          purpose: tells several draws of one layer from each other.
        """
        key = jax.random.fold_in(jax.random.wrap_key_data(self.run_key), purpose)
        return jax.random.fold_in(key, self.step // interval)


class Router(abc.ABC):
    """A router: a frozen dataclass whose fields are its settings.

    Derive from it, and write :meth:`bounds` and :meth:`__call__`; everything else has the answer of
    a router without state and noise.  Knows no weights of experts, no mesh, no transport.

    Attributes:
      causal: whether, at inference, a token's routing is independent of later tokens.  Generation,
        the evaluation command and held-out evaluation route as at inference.  Without it a model
        trains and reports its held-out loss; it writes no sample, and generation and the
        evaluation command are refused.
      causal_in_training: whether it is so in training as well; one that looks at the batch there
        alone, to even out its experts, may leave it True: its ``group`` says so.  A router with
        ``causal`` alone generates and is evaluated.  A decoder refuses routers that lack
        either, unless ``config.model.moe.allow_non_causal``.
      group: the tokens that one choice may look at: ``"token"``, ``"sequence"``, or ``"batch"``
        (all devices' together; of a microbatch, where there are several).
      reads: fields of :class:`RouterInput` beyond x, logits and state: ``"noise"``,
        ``"previous_logits"``, ``"segments"``, ``"step"`` and ``"token_ids"``, see :data:`READABLE`.
        Nothing else is made.
      free_experts: experts beside the E, which cost no row: their columns stand behind the others
        in logits and probabilities, see :meth:`free_output`.
      chooses: whether experts are chosen; False of a router that returns :class:`SoftSlots`, which
        leaves nothing for transforms and adjugate experts.
      grows: whether more units of the width, 0 in tokens and in its parameters, leave what it
        computes as it is.
      losses: default coefficients of the routing losses by name; 0: logged, and not weighed.
      gives: facts that losses ask for: ``"distribution"`` (probs_TE are non-negative and sum to
        1), ``"softmax"`` (they are that of logits_TE), ``"logits"``, ``"counts"`` (expert_TK), and
        names of :attr:`Routing.extra`.
      logits: None for the layer's own, ``norm(x) @ router_DE``; else a method (params, x_TD,
        num_experts) -> logits_TE.
    """

    causal: ClassVar[bool] = True
    causal_in_training: ClassVar[bool] = True
    group: ClassVar[str] = "token"
    reads: ClassVar[frozenset[str]] = frozenset()
    losses: ClassVar[Mapping[str, float]] = {"balance": 1e-2, "entropy": 1e-4, "router_z": 0.0}
    gives: ClassVar[frozenset[str]] = frozenset({"distribution", "softmax", "logits", "counts"})
    logits: ClassVar[Callable[[Any, Params, Array, int], Array] | None] = None
    free_experts: ClassVar[int] = 0
    chooses: ClassVar[bool] = True
    grows: ClassVar[bool] = True

    def obstacle(self, num_experts: int) -> str | None:
        """Says why the settings do not fit the number of experts: "NAME=VALUE must …".

        A setting whose unit is "experts" cannot be more than there are.
        """
        for field in dataclasses.fields(self):
            count = getattr(self, field.name)
            if field.metadata.get("unit") == "experts" and count > num_experts:
                return (
                    f"{field.name}={count:g} must be at most "
                    f"config.model.moe.num_experts={num_experts}"
                )
        return None

    def describe(self) -> str:
        """Names the rule in a few words, for reports and tables."""
        settings = ", ".join(f"{f.name} {getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{type(self).__name__}({settings})"

    def advice(self, wish: str) -> str:
        """Says what to change for ``"fewer"`` or ``"more"`` experts per token, or ``"balance"``."""
        if wish == "balance":
            return "raise config.loss.balance.weight"
        return "change the settings of the router"

    @abc.abstractmethod
    def bounds(self, num_experts: int) -> Bounds:
        """Bounds on the experts of a token."""

    def parameters(self, width: int, num_experts: int) -> dict[str, Parameter]:
        """Parameters of the router in one layer, by name."""
        return {"router_DE": Parameter((width, num_experts + self.free_experts))}

    def initial_state(self, num_experts: int) -> dict[str, Array]:
        """State of the router in one layer, which no gradient changes."""
        return {}

    def layer_state(self, width: int, num_experts: int) -> dict[str, Array]:
        """The same of a layer of that width, for a state that needs it: sums of tokens."""
        return self.initial_state(num_experts)

    def frozen(self, state_N: Params) -> "Router | None":
        """The router whose settings say what the state said, for a format that has no state.

        Args:
          state_N: of all layers of this router, stacked.

        Returns:
          one that routes alike at inference; itself where settings cannot say it; None where they
          could, but the layers differ.
        """
        return self

    @abc.abstractmethod
    def __call__(self, params: Params, given: RouterInput) -> Routing | ExpertSlots | SoftSlots:
        """Routes T tokens; tokens that are not valid (padding) get no expert at all."""

    def free_output(
        self, params: Params, x_TD: Float[Array, "T D"], routing: Routing
    ) -> Float[Array, "T D"] | None:
        """The sum of what experts that cost no row give each token, float32; None: there are none.

        Of identity experts the token itself, times :attr:`Routing.free_T`.
        """
        if routing.free_T is None:
            return None
        # A token without a weight may hold anything, and 0 * NaN is NaN.
        free_T1 = routing.free_T[:, None]
        return free_T1 * jnp.where(free_T1 != 0, x_TD, 0)

    def shown(self, state: Params) -> dict[str, Array]:
        """Numbers of one layer's state, by name, that metrics and report show."""
        return {}

    def initial_cache(self, batch: int, length: int, num_experts: int) -> dict[str, Array]:
        """Makes the cache of a layer for sequences that it generates, before their first token.

        For a router whose choice at inference depends on earlier tokens of a sequence; a KV cache
        carries it.  Names end in axes, which begin with B; where S is among them, the array has
        room for so many tokens, zeros where none has come.

        Args:
          batch: B, sequences.
          length: S, tokens that there is room for.
          num_experts: E.
        """
        return {}

    def next_cache(self, params: Params, given: RouterInput, routing: Any) -> Params:
        """``given.cache`` with the tokens that were routed."""
        return given.cache

    @property
    def keeps_cache(self) -> bool:
        """Whether the choice at inference depends on earlier tokens of the sequence."""
        return type(self).initial_cache is not Router.initial_cache

    def on_logits(
        self, logits_TE: Float[Array, "T E"], valid_T: Bool[Array, "T"]
    ) -> Routing | ExpertSlots | SoftSlots:
        """Routes one sequence by logits alone, with the initial state and without noise."""
        experts = logits_TE.shape[-1] - self.free_experts
        given = RouterInput(
            None,
            logits_TE,
            valid_T,
            self.initial_state(experts),
            expected=self.bounds(experts).expected,
            length=logits_TE.shape[0],
        )
        return self({}, given)

    def measure(self, params: Params, given: RouterInput, routing: Any) -> Any:
        """Sums over tokens for :meth:`next_state`; they add up over devices and microbatches."""
        return {}

    def next_state(
        self, params_N: Params, state_N: Params, seen_N: Any
    ) -> tuple[Params, Params | None]:
        """The state after an applied update.

        Args:
          params_N: parameters of all layers of this router, stacked.
          state_N: their states.
          seen_N: their sums of :meth:`measure` over the whole batch.

        Returns:
          the new states; new values of parameters, by name (None: parameters stay as the optimizer
          made them).  Where these differ from the old ones, number by number, the optimizer's
          moments become 0.
        """
        return state_N, None


def no_logits(num_experts: int, x_TD: Float[Array, "T D"]) -> Float[Array, "T E"]:
    """Zeros, for a router that scores nothing."""
    return jnp.zeros((x_TD.shape[0], num_experts), jnp.float32)
