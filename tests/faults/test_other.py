"""Going on with another model, tokenizer or dtype, and mistakes in a configuration: refused, and nothing is written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gpt1_jax.config_file import parse_config
from tests.faults.conftest import Row
from tests.running import RUN, Running, contents

ROW = pytest.mark.fault("other model, tokenizer, dtype, keys")

# Each changes what a run computes.
CHANGES = [
    "data.sources=[{kind: python_docs}]",
    "train.spikes={skip: 4}",
    *"""seed=1
    model.vocab_size=321 model.context_length=64 model.num_layers=3 model.embed_dim=64 model.num_heads=2
    model.mlp_dim=128 model.num_kv_heads=2 model.objective=prefix model.norm_position=pre model.norm=rms_norm
    model.activation=swiglu model.positions=rotary model.qk_norm=true model.bias=false model.tied_output=false
    model.logit_cap=30.0 model.dropout=0.0 model.attention_dropout=0.0 model.dtype=bfloat16
    data.validation_fraction=0.2 data.windows=packed data.shard_tokens=1000 data.tokenizer.sample_bytes=20000
    data.tokenizer.file=another.model data.cleaning.min_chars=64
    train.steps=61 train.steps=59 train.batch_size=16 train.context_length=16 train.accumulation=2
    train.deterministic_groups=2
    optimizer.rule=lion optimizer.learning_rate=1e-3 optimizer.schedule=linear optimizer.warmup_steps=6
    optimizer.beta1=0.8 optimizer.beta2=0.99 optimizer.epsilon=1e-6 optimizer.weight_decay=0 optimizer.clip_norm=2
    """.split(),
]


@pytest.fixture(autouse=True)
def as_in_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of its own does to itself is not done to that of the tests."""
    monkeypatch.setattr("gpt1_jax.training.hardware.keep_freed_memory", lambda: None)


@pytest.fixture
def finished(uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a finished run, and the folder that commands run in."""
    shutil.copytree(uninterrupted, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@ROW
def test_a_run_does_not_go_on_as_another(finished, gpt1, row: Row):
    before = contents(finished)
    for change in CHANGES:
        result = gpt1("train", "config.yaml", change)
        assert (result.code, result.out) == (2, ""), (change, result.err)
        assert f"{RUN}: this run was made by another configuration:\n  {change.partition('=')[0]}" in result.err
        assert " there, " in result.err and "Traceback" not in result.err
        assert contents(finished) == before
        row.tried()
    ((code, out, err),) = Running(finished, "model.embed_dim=64").finish()  # as a process, once
    assert (code, out) == (2, "") and "  model.embed_dim: 32 there, 64 now" in err
    assert contents(finished) == before
    row.tried()


@ROW
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("data.tokenizer.sample_bytes=20000", "its tokenizer is not the one that the run's"),
        ("model.embed_dim=64", "its arrays are not those that the configuration asks for"),
        ("optimizer.rule=lion", "its arrays are not those that the configuration asks for"),
    ],
)
def test_what_cannot_be_gone_on_with_is_refused_however_it_is_asked_for(finished, gpt1, row: Row, change, told):
    def files() -> dict[str, tuple]:  # a lock has come and gone in the folder
        return {name: found for name, found in contents(finished / "runs").items() if found[1] is not None}

    before = files()
    result = gpt1("train", "config.yaml", "train.steps=64", change, "--allow-changes")
    assert (result.code, result.out) == (2, ""), result.err
    assert told in result.err
    assert files() == before
    row.tried()


@ROW
def test_numbers_are_numbers_and_words_are_words(finished, gpt1, row: Row):
    """The file has 1e-2, which YAML 1.1 reads as a word; and a field of the name "no" is no boolean."""
    assert "learning_rate: 1e-2" in (finished / "config.yaml").read_text()
    before = contents(finished)
    for same in ("0.01", "1e-2", "1.0E-2", "1_0e-3"):
        assert gpt1("train", "config.yaml", f"optimizer.learning_rate={same}").code == 0
        assert contents(finished) == before
        row.tried()
    config = parse_config("data: {sources: [{kind: files, paths: [no], text_field: no}]}", "c")
    assert (config.data.sources[0].paths, config.data.sources[0].text_field) == (("no",), "no")
    row.tried()


# A mistake in a file, its line, and what is said of it.
MISTAKES = [
    ("seed: 1\nseed: 2", 2, "seed: given twice; keep one of them"),
    ("train:\n  batch_size: 3\n  steps: 4\n  batch_size: 3", 4, "train.batch_size: given twice"),
    ("model: {num_layers: 2}\nmodel: {num_heads: 2}", 2, "model: given twice"),
    ("\noptimizer: {learning_rate: '1e-3'}", 2, 'optimizer.learning_rate="1e-3": input should be a valid number'),
    ("optimizer: {learning_rate: 1e}", 1, 'optimizer.learning_rate="1e": input should be a valid number'),
    ("train: {steps: 1e3}", 1, "train.steps=1000.0: input should be a valid integer"),
    ("train:\n  steps: '100'", 2, 'train.steps="100": input should be a valid integer'),
    ("seed: no", 1, 'seed="no": input should be a valid integer'),
    ("logging:\n  tensorboard: no", 2, 'logging.tensorboard="no": input should be a valid boolean'),
    ("logging: {tensorboard: off}", 1, 'logging.tensorboard="off": input should be a valid boolean'),
    ("logging: {tensorboard: 0}", 1, "logging.tensorboard=0: input should be a valid boolean"),
    ("model:\n  num_layer: 3", 2, "model.num_layer=3: unknown key; did you mean 'model.num_layers'?"),
    ("modle: {}", 1, "modle={}: unknown key; did you mean 'model'?"),
    ("train: {stepz: 3}", 1, "train.stepz=3: unknown key; did you mean 'train.steps'?"),
    ("batch_size: 3", 1, "batch_size=3: unknown key; did you mean 'train.batch_size'?"),
    ("model: {dtype: float16}", 1, 'model.dtype="float16": choose from auto, float32, bfloat16'),
    ("optimizer: {rule: adam}", 1, "did you mean 'adamw'?"),
    ("model: {dropout: 1.5}", 1, "model.dropout=1.5: input should be less than 1"),
    ("train: {steps: -1}", 1, "train.steps=-1: input should be greater than 0"),
    ("train: [1, 2]", 1, "train=[1, 2]"),
    ("- seed", 1, "expected keys such as 'model:'"),
    ("seed: 1\n\tmodel: {}", 2, "not valid YAML"),
    ("model: {num_layers: [1}", 1, "not valid YAML"),
    ("seed: &a 1\nname: *a", 2, "aliases are not supported"),
    ("name: !!python/name:os.system", 1, "the tag "),
    ("name: ../elsewhere", 1, 'name="../elsewhere"'),
]


@ROW
@pytest.mark.parametrize("command", ["train", "prepare", "plan"])
def test_a_mistake_is_told_with_file_and_line_and_nothing_is_written(
    command, gpt1, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: Row
):
    monkeypatch.chdir(tmp_path)
    options = ["--topology", "cpu:8"] if command == "plan" else []
    for text, line, told in MISTAKES:
        (tmp_path / "config.yaml").write_text(text)
        result = gpt1(command, "config.yaml", *options)
        assert (result.code, result.out) == (2, ""), (text, result.err)
        assert f"config.yaml:{line}: " in result.err or told.startswith("expected keys"), (text, result.err)
        assert told in result.err, (text, result.err)
        assert "Traceback" not in result.err
        assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
        row.tried()


@ROW
def test_a_mistake_in_a_recipe_is_told_likewise(gpt1: Callable, tmp_path: Path, monkeypatch, row: Row):
    monkeypatch.chdir(tmp_path)
    recipe = "base: runs/base\ntask:\n  form: chat\n  validation: {kind: toy_dialogue, split: validation}\n"
    for text, line, told in (
        (recipe + "train: {epochs: 1e0}", 5, "train.epochs=1.0: input should be a valid integer"),
        (recipe + "base: runs/other", 5, "base: given twice"),
        (recipe + "train: {epoch: 1}", 5, "did you mean 'train.epochs'?"),
        (recipe.replace("chat", "cat"), 3, "did you mean 'chat'?"),
    ):
        (tmp_path / "task.yaml").write_text(text)
        result = gpt1("finetune", "task.yaml")
        assert (result.code, result.out) == (2, ""), (text, result.err)
        assert f"task.yaml:{line}: " in result.err and told in result.err, (text, result.err)
        assert [path.name for path in tmp_path.iterdir()] == ["task.yaml"]
        row.tried()
