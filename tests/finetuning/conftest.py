"""Tasks in a few words, and a tokenizer whose tokens are known by heart."""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import pytest

from gpt1_jax.config import Config, FinetuneConfig, ModelConfig
from gpt1_jax.config_file import parse, parse_config
from gpt1_jax.finetuning.dataset import Dataset
from gpt1_jax.finetuning.forms import Encoded, special_tokens
from gpt1_jax.finetuning.start import run_config
from gpt1_jax.model.transformer import Params, abstract_params
from gpt1_jax.training.choices import resolve

ROWS = {"kind": "files", "paths": ["rows.jsonl"]}
TASKS: dict[str, dict[str, object]] = {
    "classification": {"form": "classification", "text": "text", "label": "label", "labels": ["0", "1", "2"]},
    "number": {"form": "classification", "text": "text", "label": "label", "metrics": ["pearson"]},
    "entailment": {"form": "entailment", "premise": "a", "hypothesis": "b", "label": "label", "labels": ["no", "yes"]},
    "similarity": {"form": "similarity", "first": "a", "second": "b", "label": "label", "metrics": ["pearson"]},
    "multiple_choice": {"form": "multiple_choice", "context": "c", "answers": "answers", "label": "label"},
    "text_to_text": {"form": "text_to_text", "source": "a", "target": "b", "target_tokens": 6},
    "chat": {"form": "chat", "answer_tokens": 6},
}

MakeSettings = Callable[..., FinetuneConfig]


@pytest.fixture(scope="session")
def settings() -> MakeSettings:
    """Makes a configuration of one of ``TASKS``, with keys of the task, and dotted overrides."""

    def make(task: str, *overrides: str, **keys: object) -> FinetuneConfig:
        tables = {"train": ROWS, "validation": ROWS}
        return parse(FinetuneConfig, json.dumps({"task": {**TASKS[task], **tables, **keys}}), "task.yaml", overrides)

    return make


BASE = (
    "model: {vocab_size: 28, context_length: 16, num_layers: 2, embed_dim: 24, num_heads: 2, mlp_dim: 96MORE}\n"
    "evaluation: {sample_tokens: 4}\n"
)
QUIET = ["model.dtype=float32", "model.dropout=0.0", "model.attention_dropout=0.0", "model.classifier_dropout=0.0"]
QUIET += ["model.scan_layers=true"]
MakeConfig = Callable[..., Config]


@pytest.fixture(scope="session")
def run_of(settings: MakeSettings) -> MakeConfig:
    """Makes the configuration of a run over letters, without dropout, of one epoch of 10 updates of 8 examples."""

    def make(task: str, *overrides: str, model: str = "", **keys: object) -> Config:
        config = settings(task, *QUIET, "base=base", "train.batch_size=8", "train.epochs=1", *overrides, **keys)
        tokenizer = Letters().with_special_tokens(special_tokens(config.task))
        base = parse_config(BASE.replace("MORE", model), "base")
        return resolve(run_config(config, base, tokenizer, 10, seed=0))[0]

    return make


@pytest.fixture(scope="session")
def random_params() -> Callable[[ModelConfig], Params]:
    """Draws weights of which every bias and gain counts."""

    def draw(model: ModelConfig, seed: int = 0, std: float = 0.2) -> Params:
        rng = np.random.default_rng(seed)

        def leaf(path: tuple, shape: Any) -> np.ndarray:
            return rng.normal(path[-1].key == "scale", std, shape.shape).astype(np.float32)

        return jax.device_put(jax.tree.map_with_path(leaf, abstract_params(model)))

    return draw


class Letters:
    """A token for each letter: ``a`` is 0, ``z`` 25, a space 26; the separator is 27."""

    separator_id, separator_reserved = 27, True

    def __init__(self, special_tokens: Sequence[str] = ()):
        self.special_tokens = tuple(special_tokens)
        self.vocab_size = 28 + len(self.special_tokens)
        self.fingerprint = "letters"

    def encode(self, text: str) -> np.ndarray:
        return np.array(["abcdefghijklmnopqrstuvwxyz ".index(letter) for letter in text], np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        return "".join("abcdefghijklmnopqrstuvwxyz "[i] for i in ids if i < 27)

    def special_id(self, name: str) -> int:
        return 28 + self.special_tokens.index(name)

    def with_special_tokens(self, names: Sequence[str]) -> "Letters":
        return Letters(dict.fromkeys((*self.special_tokens, *names)))

    def to_bytes(self) -> bytes:
        return b"letters"


@pytest.fixture(scope="session")
def letters() -> Letters:
    """That tokenizer, without special tokens."""
    return Letters()


def examples_of(sequences: Sequence[Sequence[Sequence[int]]], labels: Sequence[float] | None = None) -> list[Encoded]:
    """Examples of given tokens, of which all but the first of a sequence are learned."""
    return [
        Encoded(
            tuple(np.array(tokens, np.int32) for tokens in example),
            tuple(np.arange(len(tokens)) > 0 for tokens in example),
            labels[number] if labels else 0.0,
            False,
        )
        for number, example in enumerate(sequences)
    ]


@pytest.fixture(scope="session")
def dataset_of() -> Callable[..., Dataset]:
    """Makes a dataset of given tokens: examples, their sequences, and the tokens of each."""
    return lambda sequences, labels=None: Dataset(examples_of(sequences, labels))


@pytest.fixture(scope="session")
def random_dataset() -> Callable[..., Dataset]:
    """Makes examples of random tokens; lengths have the long tail that texts have."""

    def make(
        size: int, choices: Sequence[int] = (1,), vocab: int = 28, longest: int = 16, typical: int = 5, seed: int = 0
    ) -> Dataset:
        rng = np.random.default_rng(seed)
        sequences = [
            [
                rng.integers(0, vocab, np.clip(int(typical * rng.lognormal(0, 0.6)) + 2, 2, longest)).tolist()
                for _ in range(choices[number % len(choices)])
            ]
            for number in range(size)
        ]
        return Dataset(examples_of(sequences, rng.integers(0, max(2, min(choices)), size).tolist()))

    return make
