"""A decoder as a model of lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dynmoe_jax import config
from dynmoe_jax.console import stage
from dynmoe_jax.data import Tokenizer
from dynmoe_jax.evaluation.answers import AnswerFile
from dynmoe_jax.evaluation.ask import TextPrompt, ask, ask_texts
from dynmoe_jax.evaluation.expert_use import ExpertUse
from dynmoe_jax.evaluation.requests import Answer, Request
from dynmoe_jax.evaluation.scoring import Scorer
from dynmoe_jax.evaluation.tree_writing import TreeWriter
from dynmoe_jax.inference.stops import Stops


class HarnessModel(TemplateLM):
    """What the harness asks of a model, answered by a :class:`Scorer`.

    How texts become tokens is the harness's own (``TemplateLM``): context and continuation are
    encoded together, and spaces at the end of a context go to the continuation.

    Args:
      scorer: of the model.
      writer: of the model.
      tokenizer: of the model.
      answers: where answers are kept.
      max_new_tokens: tokens written after a prompt, where a task does not say.
      begin_with_bos: whether BOS stands before every text; None: as the tokenizer says.
    """

    def __init__(
        self,
        scorer: Scorer,
        writer: TreeWriter,
        tokenizer: Tokenizer,
        answers: AnswerFile,
        max_new_tokens: int = 256,
        begin_with_bos: bool | None = None,
    ):
        super().__init__()
        self._scorer = scorer
        self._writer = writer
        self._tokenizer = tokenizer
        self._answers = answers
        self._max_new_tokens = max_new_tokens
        self._begin_with_bos = begin_with_bos
        if begin_with_bos is None:
            self._begin_with_bos = tokenizer.begins_with_bos
        self.experts = ExpertUse(tokenizer.vocab_size)

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model may read at once."""
        return self._scorer.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text; ``add_special_tokens`` overrides whether BOS stands before it."""
        del kwargs
        ids = self._tokenizer.encode(string).tolist()
        bos = self._begin_with_bos if add_special_tokens is None else add_special_tokens
        return [self.prefix_token_id, *ids] if bos else ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding gives it) of each request."""
        del disable_tqdm
        asked = [self._request(*instance.args) for instance in requests]
        tasks = [instance.task_name or "" for instance in requests]
        answers = self._answer(asked, tasks, "Scoring continuations")
        return [(answer.log_prob, answer.greedy) for answer in answers]

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any):
        """As :meth:`loglikelihood`, of (strings, context, continuation), the latter encoded."""
        del disable_tqdm, kwargs
        asked = [Request((*context, *rest), len(rest)) for _, context, rest in requests]
        answers = self._answer(asked, [""] * len(asked), "Scoring continuations")
        return [(answer.log_prob, answer.greedy) for answer in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, in the harness's windows: each token is predicted once."""
        del disable_tqdm
        asked, owners = [], []
        for owner, instance in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for context, rest in map(make_disjoint_window, windows):
                asked.append(Request((*context, *rest), len(rest)))
                owners.append(owner)
        tasks = [requests[owner].task_name or "" for owner in owners]
        sums = np.zeros(len(requests))
        for owner, answer in zip(owners, self._answer(asked, tasks, "Scoring texts"), strict=True):
            sums[owner] += answer.log_prob
        return sums.tolist()

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt, greedily, up to a string that ends it.

        Raises:
          ConfigError: a task wants its answers drawn at random.
        """
        del disable_tqdm
        asked = [self._prompt(instance) for instance in requests]
        tasks = [instance.task_name or "" for instance in requests]
        with stage("Writing answers", total=len(asked), unit="requests") as shown:
            found = ask_texts(
                self._writer, self._tokenizer, self._answers, asked, lambda i: shown.advance()
            )
        for prompt, task, written in zip(asked, tasks, found, strict=True):
            read = (*prompt.tokens, *written.ids[:-1])
            self.experts.add(task, read, written.experts_N, written.experts_L)
        return [
            postprocess_generated_text(
                Stops(prompt.stops, self._tokenizer).before(written.ids), list(prompt.stops), None
            )
            for prompt, written in zip(asked, found, strict=True)
        ]

    def _prompt(self, instance: Instance) -> TextPrompt:
        context, settings = instance.args
        settings = normalize_gen_kwargs(settings, self._max_new_tokens)
        if settings.get("do_sample"):
            raise config.ConfigError(
                f"The task {instance.task_name} draws its answers at random (do_sample), which "
                "would differ from run to run; leave it out of --tasks."
            )
        # As the harness's own models: there must be room for the whole answer.
        limit = min(settings["max_gen_toks"], max(1, self.max_length // 2))
        tokens = self.tok_encode(context)[-(self.max_length - limit) :]
        stops = handle_stop_sequences(settings.get("until"), eos=None)
        return TextPrompt(tuple(tokens), limit, tuple(stop for stop in stops if stop))

    def _request(self, context: str, continuation: str) -> Request:
        if context:
            before, rest = self._encode_pair(context, continuation)
        else:
            rest = self.tok_encode(continuation, add_special_tokens=False)
            before = [self.prefix_token_id]
        if not rest:
            raise ValueError(f"The continuation {continuation!r} has no token of its own.")
        return Request((*before, *rest), len(rest))

    def _answer(
        self, requests: Sequence[Request], tasks: Sequence[str], title: str
    ) -> list[Answer]:
        """The answers; the experts behind each count for its task."""
        with stage(title, total=len(requests), unit="requests") as shown:
            answers = ask(self._scorer, self._answers, requests, lambda i: shown.advance())
        for request, task, answer in zip(requests, tasks, answers, strict=True):
            read = request.read[-len(answer.experts_L) :]
            self.experts.add(task, read, answer.experts_N, answer.experts_L)
        return answers
