"""A run as a model of the public evaluation harness, EleutherAI's lm-eval (an extra, imported with this module).

It tokenizes, cuts and stops as the harness's own adapter of transformers does, so a run and its exported folder get
the same scores. Importing this module registers the model under the name ``gpt1_jax``; lm-eval finds no models by
itself that other packages bring.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

import numpy as np
from etils import epath
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.tasks import TaskManager

from gpt1_jax.errors import UserError, nearest
from gpt1_jax.evaluation.continuations import Continuation, Predictor
from gpt1_jax.generation.decode import stream
from gpt1_jax.generation.detokenize import Detokenizer
from gpt1_jax.generation.sampling import Sampling
from gpt1_jax.training.run import Run, open_run

_NEW_TOKENS = 256  # of a task that does not say how many: as in the adapter of transformers
_CHUNK = 16  # new tokens between two looks at what has been generated


class _Settings(NamedTuple):
    """How a request is to be continued; requests that agree on it share batches."""

    sampling: Sampling
    max_tokens: int
    stops: tuple[str, ...]


@register_model("gpt1_jax")
class HarnessModel(TemplateLM):
    """What the harness asks: log-probabilities of continuations and of whole texts, and generation.

    Args:
        run: a run, or its folder.
        batch_size: sequences that are computed at once; None: the run's ``evaluation.batch_size``.
        seed: of sampled continuations.
    """

    def __init__(self, run: Run | str, batch_size: int | None = None, seed: int = 0):
        super().__init__()
        self._run = run if isinstance(run, Run) else open_run(epath.Path(run))
        config = self._run.config
        if batch_size is not None:
            evaluation = config.evaluation.model_copy(update={"batch_size": int(batch_size)})
            config = config.model_copy(update={"evaluation": evaluation})
        self._config, self._seed = config, seed
        self._predictor = Predictor(config, self._run.mesh, self.eot_token_id)

    @property
    def eot_token_id(self) -> int:
        """The separator, which stands before a text with no context too."""
        return self._run.tokenizer.separator_id

    @property
    def max_length(self) -> int:
        """Tokens that the model reads: the training context."""
        return self._config.context_length

    @property
    def max_gen_toks(self) -> int:
        """New tokens where a task does not say how many."""
        return min(_NEW_TOKENS, self.max_length // 2)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """The tokens of a text, and none around them, whatever the harness asks for: it puts the separator itself."""
        return self._run.tokenizer.encode(string).tolist()

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log-probabilities of whole texts, each token of a long one predicted once."""
        texts = [request.args[0] for request in requests]
        whole = [self._continuation([self.eot_token_id], self.tok_encode(text)) for text in texts]
        found = iter(self._predictor(self._run.params, [one for one in whole if len(one.tokens)]))
        results = [next(found).log_probability if len(one.tokens) else 0.0 for one in whole]
        for text, result in zip(texts, results, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), result)
        return results

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        asked = [self._continuation(context, tokens) for _, context, tokens in requests]
        found = self._predictor(self._run.params, asked)
        results = [(prediction.log_probability, bool(prediction.greedy.all())) for prediction in found]
        for (texts, _, _), result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, result)
        return results

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues every context until one of its stops, which is cut off.

        Raises:
            UserError: if a task asks for a kind of decoding that there is none of here.
        """
        groups: dict[_Settings, list[int]] = {}
        encoded = []
        for index, request in enumerate(requests):
            context, asked = cast(tuple[str, Mapping[str, Any]], request.args)
            groups.setdefault(self._settings(asked), []).append(index)
            encoded.append(np.asarray(self.tok_encode(context), np.int32))
        results = [""] * len(requests)
        size, batches = self._config.evaluation.batch_size, 0
        for settings, group in groups.items():
            group.sort(key=lambda index: len(encoded[index]))  # a batch is as wide as its longest prompt
            for batch in (group[first : first + size] for first in range(0, len(group), size)):
                # Another seed for each batch, or a request that is repeated would be answered alike.
                texts = self._generate([encoded[index] for index in batch], settings, self._seed + batches)
                batches += 1
                for index, text in zip(batch, texts, strict=True):
                    results[index] = text
                    self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return results

    def _settings(self, asked: Mapping[str, Any]) -> _Settings:
        settings: dict[str, Any] = dict(normalize_gen_kwargs(dict(asked), self.max_gen_toks))
        sampled = settings.pop("do_sample")
        sampling = Sampling(
            float(settings.pop("temperature", 1.0 if sampled else 0.0)),
            settings.pop("top_k", None) or None,  # there, 0 is none
            settings.pop("top_p", 1.0),
        )
        found = _Settings(sampling, settings.pop("max_gen_toks"), tuple(settings.pop("until")))
        if settings:
            raise UserError(
                f"generation_kwargs {', '.join(settings)}: the task asks for what this model does not do; it takes "
                "until, max_gen_toks, do_sample, temperature, top_k and top_p"
            )
        return found

    def _generate(self, prompts: Sequence[np.ndarray], settings: _Settings, seed: int) -> list[str]:
        """The new text of each prompt, up to its first stop."""
        pieces = stream(
            self._config,
            self._run.params,
            prompts,
            sampling=settings.sampling,
            max_tokens=settings.max_tokens,
            seed=seed,
            separator_id=self.eot_token_id,
            chunk=_CHUNK,
        )
        detokenizers = [Detokenizer(self._run.tokenizer.decode, prompt) for prompt in prompts]
        texts, ended = [""] * len(prompts), np.zeros(len(prompts), bool)
        for new in pieces:
            texts = [text + one.push(row) for text, one, row in zip(texts, detokenizers, new, strict=True)]
            ended |= [len(row) < max(map(len, new)) for row in new]  # at a separator
            ended |= [any(stop in text for stop in settings.stops if stop) for text in texts]
            if ended.all():
                break
        texts = [text + one.flush() for text, one in zip(texts, detokenizers, strict=True)]
        return [postprocess_generated_text(text, list(settings.stops), None) for text in texts]

    @staticmethod
    def _continuation(context: Sequence[int], tokens: Sequence[int]) -> Continuation:
        return Continuation(np.asarray(context, np.int32), np.asarray(tokens, np.int32))


def check_tasks(tasks: Sequence[str]) -> TaskManager:
    """Looks tasks up; nothing is fetched.

    Args:
        tasks: names of tasks, groups and tags that lm-eval knows, or paths of its YAML files.

    Returns:
        What knows them.

    Raises:
        UserError: if there is no such task.
    """
    known = TaskManager()
    for task in tasks:
        if task not in known.all_tasks and not epath.Path(task).is_file():
            raise UserError(
                f"--harness {task}: lm-eval has no such task, and there is no such YAML file"
                f"{nearest(task, known.all_tasks)}"
            )
    return known


def evaluate_in_harness(
    run: Run, known: TaskManager, tasks: Sequence[str], limit: int | None
) -> dict[str, dict[str, Any]]:
    """Asks tasks of the harness.

    Args:
        run: the run.
        known: what :func:`check_tasks` gave.
        tasks: their names, or paths.
        limit: rows of each, at most; None: all.

    Returns:
        By task, its metrics as the harness names them, with their standard errors.
    """
    found = simple_evaluate(
        model=HarnessModel(run),
        tasks=list(tasks),
        limit=limit,
        task_manager=known,
        log_samples=False,
        torch_random_seed=None,  # torch need not be here
    )
    assert found is not None, "this is the only process"
    return found["results"]
