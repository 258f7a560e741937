"""What the tests share: the smallest model, and a corpus small enough to prepare in a second."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gpt1_jax.config import Config, ModelConfig
from gpt1_jax.data.corpus import Corpus

# libtpu is installed, so that it can be compiled for; nothing is to ask for a TPU.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")


@pytest.fixture(scope="session")
def tiny_model() -> ModelConfig:
    """Two layers without dropout, sizes all different."""
    return ModelConfig(
        vocab_size=97,
        context_length=16,
        num_layers=2,
        embed_dim=32,
        num_heads=4,
        mlp_dim=48,
        dropout=0.0,
        attention_dropout=0.0,
        dtype="float32",
    )


# Every departure from the paper's model, alone, and those that go together.
VARIATIONS: dict[str, dict[str, object]] = {
    "pre": {"norm_position": "pre"},
    "rms_norm": {"norm": "rms_norm"},
    "swiglu": {"activation": "swiglu"},
    "rotary": {"positions": "rotary"},
    "grouped": {"num_kv_heads": 2},
    "qk_norm": {"qk_norm": True},
    "no_bias": {"bias": False},
    "untied": {"tied_output": False},
    "capped": {"logit_cap": 3.0},
    "prefix": {"objective": "prefix"},
    "masked": {"objective": "masked"},
}
VARIATIONS["modern"] = {key: value for name in list(VARIATIONS)[:9] for key, value in VARIATIONS[name].items()}
VARIATIONS["masked modern"] = VARIATIONS["modern"] | {"objective": "masked"}
VARIATIONS["prefix modern"] = VARIATIONS["modern"] | {"objective": "prefix"}


@pytest.fixture(scope="session")
def variations(tiny_model: ModelConfig) -> dict[str, ModelConfig]:
    """The smallest model with one departure from the paper each, and with several."""
    return {name: ModelConfig.model_validate(tiny_model.model_dump() | keys) for name, keys in VARIATIONS.items()}


@pytest.fixture(params=VARIATIONS)
def variation_name(request: pytest.FixtureRequest) -> str:
    """Each of their names in turn."""
    return request.param


@pytest.fixture
def variation(variation_name: str, variations: dict[str, ModelConfig]) -> ModelConfig:
    """Each of them in turn."""
    return variations[variation_name]


SENTENCES = ("The cat sat on the mat.", "A dog ran over the hill, far away.", "Birds sing when the day begins.")


@pytest.fixture(scope="session")
def corpus_yaml(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The data section of a configuration, in YAML: two hundred documents of a few hundred characters."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(200):
        words = [SENTENCES[(number * k + k * k) % 3].replace("the", f"the {number % 17}th") for k in range(8)]
        (folder / f"{number:03}.txt").write_text(" ".join(words) + f"\nThis was story {number}.\n")
    return (
        f"data:\n  root: {folder / 'prepared'}\n  validation_fraction: 0.1\n  workers: 1\n"
        f"  sources:\n    - kind: files\n      paths: ['{folder}/*.txt']\n"
    )


MODEL_YAML = (
    "model: {vocab_size: 320, context_length: 32, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 64}\n"
    "optimizer: {warmup_steps: 2, learning_rate: 1e-2}\n"
)


@pytest.fixture(scope="session")
def run_yaml(corpus_yaml: str) -> str:
    """A configuration that trains in seconds, dropout on."""
    return (
        corpus_yaml
        + MODEL_YAML
        + "train: {steps: 12, batch_size: 8, log_every: 1}\ncheckpoint: {every: 4}\n"
        + "evaluation: {every: 6, batch_size: 8, sample_tokens: 8}\nlogging: {tensorboard: false}\n"
    )


@pytest.fixture(scope="session")
def corpus(run_yaml: str) -> Corpus:
    """The prepared corpus of that configuration."""
    from gpt1_jax.config_file import parse_config
    from gpt1_jax.data.prepare import prepare

    return Corpus(prepare(parse_config(run_yaml, "test")))


@pytest.fixture
def config_file(tmp_path: Path, run_yaml: str) -> Path:
    """The same configuration as a file, its runs beside it."""
    path = tmp_path / "config.yaml"
    path.write_text(f"name: run\nruns_dir: {tmp_path / 'runs'}\n{run_yaml}")
    return path


class Result(NamedTuple):
    """What a command left: its exit code, and what it printed."""

    code: int
    out: str
    err: str


@pytest.fixture
def gpt1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Runs a command in this process, which has done its imports."""
    from gpt1_jax import cli

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["gpt1", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        code = ended.value.code
        assert isinstance(code, int)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def compile_once() -> Iterator[None]:
    """Compiles a step once for all tests of a module that make the same one."""
    from gpt1_jax.training import loop

    compiled: dict[tuple, Any] = {}
    compile_train_step = loop.compile_train_step
    of_the_host = {"log_every": 1, "max_skipped_steps": 1, "spikes": None, "double_check_every": 0}

    def compile_or_find(config: Config, *others: Any) -> Any:
        train = config.train.model_copy(update=of_the_host)
        key = (config.model, train, config.optimizer, config.data.windows, *others[2:])  # of the separator
        if key not in compiled:
            compiled[key] = compile_train_step(config, *others)
        return compiled[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "compile_train_step", compile_or_find)
        yield
