"""A decoder as a model of lm-evaluation-harness."""

from collections.abc import Sequence
from typing import Any

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
from dynmoe_jax.data.sources.document import well_formed
from dynmoe_jax.evaluation.expert_use import ExpertUse
from dynmoe_jax.evaluation.harness.answers import AnswerFile
from dynmoe_jax.evaluation.harness.ask import TextPrompt, ask, ask_texts
from dynmoe_jax.evaluation.harness.pairs import encode_pair
from dynmoe_jax.evaluation.remarks import CUT, EMPTY, PARTS, REPLACED, SHORTER, Remarks
from dynmoe_jax.evaluation.scoring.requests import Answer, Request, in_parts
from dynmoe_jax.evaluation.scoring.scoring import Scorer
from dynmoe_jax.evaluation.scoring.tree_writing import TreeWriter
from dynmoe_jax.inference.stops import Stops


class HarnessModel(TemplateLM):
    """Model as the harness asks it, answered by a :class:`Scorer`.

    Texts become tokens as in the harness's ``hf`` model, but for a token that reaches over the
    border of context and continuation (:func:`.pairs.encode_pair`).  What no model can take as it
    is ends no evaluation; it is counted in ``remarks``.

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
        self.remarks = Remarks(scorer.max_length)

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
        """Token ids of a text.

        ``add_special_tokens`` overrides whether BOS stands before it.  By default a text that
        begins with BOS gets no second one, as in the harness's ``hf`` model.
        """
        del kwargs
        ids = self._tokenizer.encode(well_formed(string)).tolist()
        bos = add_special_tokens
        if bos is None:
            bos = self._begin_with_bos and ids[:1] != [self.prefix_token_id]
        return [self.prefix_token_id, *ids] if bos else ids

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """(log p of the continuation, whether greedy decoding gives it) of each request."""
        del disable_tqdm
        asked = [self._requests(instance) for instance in requests]
        tasks = [instance.task_name or "" for instance in requests]
        return self._scored(asked, tasks, "Scoring continuations")

    def _loglikelihood_tokens(self, requests, disable_tqdm: bool = False, **kwargs: Any):
        """As :meth:`loglikelihood`, of (strings, context, continuation), the latter encoded."""
        del disable_tqdm, kwargs
        asked = [[Request((*context, *rest), len(rest))] for _, context, rest in requests]
        return self._scored(asked, [""] * len(asked), "Scoring continuations")

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """log p of each text, in the harness's windows: each token is predicted once."""
        del disable_tqdm
        asked, tasks = [], [instance.task_name or "" for instance in requests]
        for task, instance in zip(tasks, requests, strict=True):
            self._note(task, instance.args[0])
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(instance.args[0], add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            pairs = map(make_disjoint_window, windows)
            asked.append([Request((*context, *rest), len(rest)) for context, rest in pairs])
        return [log_prob for log_prob, _ in self._scored(asked, tasks, "Scoring texts")]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Writes a text after each prompt, greedily, up to a string that ends it.

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
        task = instance.task_name or ""
        self._note(task, context)
        # As the harness's own models: there must be room for the whole answer.
        wanted = settings["max_gen_toks"]
        limit = min(wanted, max(1, self.max_length // 2))
        if limit < wanted:
            self.remarks.add(task, SHORTER, wanted)
        # Where there is neither a text nor BOS, something has to be read.
        tokens = self.tok_encode(context) or [self.prefix_token_id]
        if len(tokens) > self.max_length - limit:
            self.remarks.add(task, CUT, len(tokens) + limit)
            tokens = tokens[-(self.max_length - limit) :]
        stops = handle_stop_sequences(settings.get("until"), eos=None)
        return TextPrompt(tuple(tokens), limit, tuple(stop for stop in stops if stop))

    def _requests(self, instance: Instance) -> list[Request]:
        """Requests that together score a continuation: mostly one."""
        (context, continuation), task = instance.args, instance.task_name or ""
        self._note(task, context, continuation)
        before, rest = self._encode_pair(context, continuation)
        if not rest:
            self.remarks.add(task, EMPTY)
            return []
        request = Request((*before, *rest), len(rest))
        parts = in_parts(request, self.max_length)
        if len(parts) > 1:
            self.remarks.add(task, PARTS, len(rest))
        elif len(request.read) > self.max_length:
            self.remarks.add(task, CUT, len(request.read))
            # Here, so that answers are kept under what was read.
            return [Request(request.tokens[-(self.max_length + 1) :], request.scored)]
        return parts

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens that are read, at least one, and those that are scored."""
        if context:
            before, rest = encode_pair(
                self.tok_encode, well_formed(context), well_formed(continuation)
            )
        else:
            before, rest = [], self.tok_encode(continuation, add_special_tokens=False)
        if not before and rest[:1] == [self.prefix_token_id]:  # the text itself begins with it
            return rest[:1], rest[1:]
        return before or [self.prefix_token_id], rest

    def _note(self, task: str, *texts: str) -> None:
        """Counts a request of a task, and whether UTF-8 can encode it."""
        self.remarks.asked(task)
        if any(well_formed(text) != text for text in texts):
            self.remarks.add(task, REPLACED)

    def _scored(
        self, asked: Sequence[Sequence[Request]], tasks: Sequence[str], title: str
    ) -> list[tuple[float, bool]]:
        """(log p, whether greedy) of the parts of each request together."""
        owners = [i for i, parts in enumerate(asked) for _ in parts]
        flat = [part for parts in asked for part in parts]
        sums, greedy = [0.0] * len(asked), [True] * len(asked)
        answers = self._answer(flat, [tasks[owner] for owner in owners], title)
        for owner, answer in zip(owners, answers, strict=True):
            sums[owner] += answer.log_prob
            greedy[owner] = greedy[owner] and answer.greedy
        return list(zip(sums, greedy, strict=True))

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
