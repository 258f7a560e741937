"""What comes back from a folder: every bit of the weights, a run like any other, or one message that says why not."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt1_jax.config_file import load_config, parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.interop import importing
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.interop.huggingface import export_huggingface
from gpt1_jax.interop.importing import import_run
from gpt1_jax.interop.layout import PREFIX, public_tensors
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.training import loop
from gpt1_jax.training.checkpoint import Checkpoints
from gpt1_jax.training.choices import resolve
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.run import check_run, open_run

MODEL = "model.safetensors"
FLOAT32 = "model.dtype=float32"
Edit = Callable[[dict[str, np.ndarray]], Any]


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(dropout=0.25, attention_dropout=0.125)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    export_huggingface(run, out, {}, 10**9)
    return out


@pytest.fixture
def folder(exported, tmp_path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(exported, tmp_path / "model")


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    found = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in found.items() if value is not ...}))


def edit_tensors(folder: Path, edit: Edit) -> None:
    tensors = load_file(folder / MODEL)
    edit(tensors)
    save_file(tensors, folder / MODEL, {"format": "pt"})


def assert_same_params(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def refusal(folder: Path, *overrides: str) -> str:
    """The message of a refused import, which leaves nothing."""
    before = sorted(folder.parent.iterdir())
    with pytest.raises(UserError) as error:
        import_run(folder, folder.parent / "run", overrides)
    assert sorted(folder.parent.iterdir()) == before
    return str(error.value)


@pytest.mark.parametrize("max_bytes", [10**9, 100_000])
def test_what_was_exported_comes_back_bit_by_bit(run, tmp_path, max_bytes):
    export_huggingface(run, tmp_path / "model", {}, max_bytes)
    config = import_run(tmp_path / "model", tmp_path / "runs" / "again", [FLOAT32, "seed=3"])
    found = open_run(tmp_path / "runs" / "again")
    assert_same_params(found.params, run.params)
    assert (found.step, found.examples, found.corpus) == (0, 0, None)
    assert found.tokenizer.to_bytes() == run.tokenizer.to_bytes()
    assert found.config == config == load_config(tmp_path / "runs" / "again" / "config.yaml")
    assert config.model == resolve(run.config)[0].model
    assert config.train.context_length == run.config.train.context_length
    assert (config.seed, config.name, config.run_dir) == (3, "again", tmp_path / "runs" / "again")
    assert Path(config.data.tokenizer.file).read_bytes() == run.tokenizer.to_bytes()
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["again"]


def test_and_goes_out_again_byte_by_byte(exported, tmp_path):
    import_run(exported, tmp_path / "run", [FLOAT32])
    export_huggingface(open_run(tmp_path / "run"), tmp_path / "model", {}, 10**9)
    for name in (MODEL, "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "model" / name).read_bytes() == (exported / name).read_bytes(), name
    assert "imported" in (tmp_path / "model" / "README.md").read_text()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_narrower_floats_become_float32(run, folder, tmp_path, dtype):
    edit_tensors(folder, lambda tensors: tensors.update({name: t.astype(dtype) for name, t in tensors.items()}))
    import_run(folder, tmp_path / "run")
    expected = jax.tree.map(lambda leaf: np.asarray(leaf).astype(dtype).astype(np.float32), run.params)
    assert_same_params(open_run(tmp_path / "run").params, expected)


def test_the_names_and_extras_of_old_files_are_taken(run, folder, tmp_path):
    def age(tensors: dict[str, np.ndarray]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix(PREFIX)] = tensors.pop(name)
        for layer in range(3):
            tensors[f"h.{layer}.attn.bias"] = np.tril(np.ones((1, 1, 40, 40), np.float32))
        tensors["lm_head.weight"] = tensors["tokens_embed.weight"].copy()

    edit_tensors(folder, age)
    edit_config(folder, gpt1_jax=..., dtype=..., n_ctx=40, n_special=0, afn="gelu_new")
    (folder / "tokenizer.model").unlink()
    import_run(folder, tmp_path / "run", [FLOAT32])
    found = open_run(tmp_path / "run")
    assert_same_params(found.params, run.params)
    assert isinstance(found.tokenizer, FastTokenizer)
    assert found.tokenizer.to_bytes() == fast_tokenizer_json(run.tokenizer)
    assert found.config.train.context_length is None
    text = "The cat <|endoftext|>  sat\n"
    assert found.tokenizer.encode(text).tolist() == run.tokenizer.encode(text).tolist()


def test_the_authors_vocabulary_comes_before_the_public_form_of_it(folder, tmp_path):
    words = ["<unk>", *"abcdefgh", *(f"{letter}</w>" for letter in "abcdefgh"), "ab", "abc</w>"]
    edit_tensors(folder, lambda t: t.update({f"{PREFIX}tokens_embed.weight": np.ones((len(words), 48), np.float32)}))
    edit_config(folder, vocab_size=len(words), gpt1_jax=...)
    (folder / "tokenizer.model").unlink()
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\na b\nab c</w>\n")
    import_run(folder, tmp_path / "run")
    found = open_run(tmp_path / "run").tokenizer.encode("ABC a").tolist()
    assert found == [words.index("abc</w>"), words.index("a</w>")]


def test_every_tensor_that_does_not_fit_is_named_at_once(folder):
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        del tensors["transformer.h.1.ln_2.bias"]
        tensors["transformer.h.0.mlp.c_fc.weight"] = np.zeros((192, 48), np.float32)
        tensors["transformer.h.3.ln_1.bias"] = np.zeros(48, np.float32)
        tensors["transformer.h.2.ln_1.bias"] = np.zeros(48, np.int64)
        tensors["tokens_embed.weight"] = np.zeros((320, 48), np.float32)
        tensors["lm_head.weight"] = np.ones((320, 48), np.float32)

    edit_tensors(folder, spoil)
    edit_config(folder, afn="relu", layer_norm_epsilon=1e-6)
    told = refusal(folder)
    for problem in (
        "transformer.h.1.ln_2.bias: missing; expected the shape [48]",
        "transformer.h.0.mlp.c_fc.weight: expected the shape [48, 192], found [192, 48]",
        "transformer.h.3.ln_1.bias: a tensor that GPT-1 does not have, of shape [48]",
        "transformer.h.2.ln_1.bias: stored as I64, expected one of F32, F16, BF16",
        "tokens_embed.weight: there twice",
        "lm_head.weight: differs from tokens_embed.weight",
        'config.json: afn="relu"',
        "config.json: layer_norm_epsilon=1e-06",
    ):
        assert problem in told, told


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model_type": "gpt2"}, 'model_type="gpt2": expected openai-gpt'),
        ({"model_type": ...}, "model_type=null"),
        ({"n_layer": 0}, "n_layer=0: expected a whole number above 0"),
        ({"n_embd": "48"}, 'n_embd="48": expected a whole number'),
        ({"n_head": True}, "n_head=true"),
        ({"n_head": 5}, "n_head=5 does not divide n_embd=48"),
        ({"resid_pdrop": 1.0}, "resid_pdrop=1.0: expected a number from 0 to below 1"),
        ({"embd_pdrop": 0.0}, "embd_pdrop=0.0 and resid_pdrop=0.25"),
        ({"vocab_size": 321}, "tokens_embed.weight: expected the shape [321, 48], found [320, 48]"),
        ({"vocab_size": 321}, "the tokenizer has 320 tokens, but the model's vocabulary is 321"),
        ({"n_positions": 41}, "positions_embed.weight: expected the shape [41, 48], found [40, 48]"),
        ({"n_layer": 2}, "h.2.ln_2.weight: a tensor that GPT-1 does not have"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings=false, but lm_head.weight is missing"),
        ({"gpt1_jax": {"tokenizer_fingerprint": "0" * 64}}, f"says that the model was trained with {'0' * 64}"),
    ],
)  # fmt: skip
def test_what_the_configuration_says_is_held_against_the_rest(folder, values, told):
    edit_config(folder, **values)
    assert told in refusal(folder)


def test_an_untied_head_that_is_the_token_embedding_is_taken(folder, tmp_path):
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["transformer.tokens_embed.weight"].copy()}))
    edit_config(folder, tie_word_embeddings=False)
    import_run(folder, tmp_path / "run")


def test_two_tokenizers_that_disagree_are_refused(folder):
    found = json.loads((folder / "tokenizer.json").read_text())
    found["added_tokens"].append(found["added_tokens"][0] | {"id": 320, "content": "<new>"})
    (folder / "tokenizer.json").write_text(json.dumps(found))
    assert "tokenizer.model has 320 tokens, but tokenizer.json has 321" in refusal(folder)


def test_no_tokenizer_no_weights_no_model_no_folder(folder, tmp_path):
    (folder / "tokenizer.model").unlink()
    (folder / "tokenizer.json").unlink()
    expected = "expected tokenizer.model, vocab.json with merges.txt, or tokenizer.json"
    assert f"no tokenizer here; {expected}" in refusal(folder)
    (folder / MODEL).rename(folder / "pytorch_model.bin")
    told = refusal(folder)
    assert "pytorch_model.bin" in told and "nothing is unpickled" in told and "save_pretrained" in told
    (folder / "pytorch_model.bin").unlink()
    assert f"no weights here; expected {MODEL}" in refusal(folder)
    (folder / "config.json").unlink()
    assert "no model here" in refusal(folder)
    with pytest.raises(UserError, match="there is no such folder"):
        import_run(tmp_path / "none", tmp_path / "run")


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def lengthen_header(path: Path) -> None:
    path.write_bytes((2**60).to_bytes(8, "little") + path.read_bytes()[8:])


@pytest.mark.parametrize("damage", [truncate, lengthen_header, lambda path: path.write_bytes(b"")])
def test_a_damaged_file_is_named(folder, tmp_path, damage):
    damage(folder / MODEL)
    with pytest.raises(DamagedError, match=r"model\.safetensors: not a sound safetensors file") as error:
        import_run(folder, tmp_path / "run")
    assert error.value.exit_code == 3
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b'{"model_type": '),
        ("config.json", b"\xff"),
        ("config.json", b"[]"),
        ("model.safetensors.index.json", b"{}"),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "../model.safetensors"}}'),
        ("model.safetensors.index.json", b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'),
        ("tokenizer.json", b"{}"),
    ],
)
def test_a_damaged_text_file_is_named(folder, tmp_path, name, content):
    if "index" in name:
        (folder / MODEL).unlink()
    (folder / name).write_bytes(content)
    with pytest.raises(DamagedError, match=r"model-00001-of-00002.safetensors|" + name):
        import_run(folder, tmp_path / "run")


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("model.num_layers=4", "model.num_layers=4: it is 3"),
        ("model.vocab_size=400", "model.vocab_size=400: it is 320"),
        ("model.norm_position=pre", "model.norm_position=pre: imported weights have the paper's architecture"),
        ("name=other", 'name="other": it is "run"'),
        ("data.tokenizer.file=null", "data.tokenizer.file=null: it is"),
        ("model.num_layer=4", "did you mean 'model.num_layers'"),
        ("evaluation.sample_tokens=40", "evaluation.sample_tokens=40 leaves no room"),
        ("train.context_length=41", "train.context_length=41 is longer"),
    ],
)
def test_an_override_cannot_contradict_the_model(folder, override, told):
    assert told in refusal(folder, override)


def test_a_failure_leaves_nothing(folder, monkeypatch):
    def fail(*_: Any) -> None:
        assert (folder.parent / ".run.partial" / "checkpoints" / "0").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(importing, "write_atomically", fail)
    with pytest.raises(KeyboardInterrupt):
        import_run(folder, folder.parent / "run")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_authors_release_takes_the_same_way(run, tmp_path, monkeypatch):
    tensors = {PREFIX + name: tensor for name, tensor in public_tensors(run.params)}
    monkeypatch.setattr(importing, "is_original", lambda _: True)
    monkeypatch.setattr(importing, "read_original", lambda _: (tensors, run.tokenizer))
    config = import_run(tmp_path, tmp_path / "run", [FLOAT32, "model.num_heads=3"])
    assert_same_params(open_run(tmp_path / "run").params, run.params)
    assert (config.model.num_heads, config.model.mlp_dim, config.model.context_length) == (3, 192, 40)
    tensors.pop(f"{PREFIX}h.1.attn.c_proj.bias")
    with pytest.raises(UserError, match=r"h\.1\.attn\.c_proj\.bias: missing"):
        import_run(tmp_path, tmp_path / "other", ["model.num_heads=3"])


pytestmark = pytest.mark.usefixtures("compile_once")


@pytest.fixture
def imported(exported, tmp_path, run_yaml, corpus: Corpus) -> Path:
    """An imported run, and beside it a configuration to train it on the corpus of the tests."""
    import_run(exported, tmp_path / "run", [FLOAT32])
    found = load_config(tmp_path / "run" / "config.yaml")
    other = parse_config(run_yaml, "test")
    config = found.model_copy(
        update={
            "model": found.model.model_copy(update={"scan_layers": True}),  # compiles sooner
            "train": other.train.model_copy(update={"steps": 6}),
            "checkpoint": other.checkpoint.model_copy(update={"every": 2, "keep": 1}),
            "logging": other.logging,
            "optimizer": other.optimizer.model_copy(update={"learning_rate": 1e-3}),
        }
    )
    (tmp_path / "on.yaml").write_text(config.to_yaml())
    return tmp_path / "on.yaml"


def go_on(path: Path, corpus: Corpus, tokenizer: Any, *overrides: str, evaluate: Any = None) -> None:
    config = load_config(path, overrides)
    loop.train(config, corpus, tokenizer, make_mesh(config.mesh), evaluate or (lambda _: {"validation_loss": 1.0}))


def test_an_imported_run_trains_on_from_its_weights(imported, run, corpus, tokenizer):
    go_on(imported, corpus, tokenizer)
    run_dir = imported.parent / "run"
    found = open_run(run_dir)
    assert (found.step, found.examples, found.corpus) == (6, 48, corpus.manifest.fingerprint)
    moved = [np.abs(a - b).max() for a, b in zip(*map(jax.tree.leaves, (found.params, run.params)), strict=True)]
    assert 0 < min(moved) and max(moved) < 1e-2  # five updates of at most 1e-3 from weights of 0.2
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["6"]  # the imported one is not needed
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 3, 4, 5, 6]
    # From now on it is a run like any other: other settings are other runs.
    with pytest.raises(UserError, match=r"optimizer\.learning_rate"):
        check_run(load_config(imported, ["optimizer.learning_rate=0.1"]), allow_changes=False)


def test_an_imported_run_gives_the_same_weights_killed_or_not(imported, corpus, tokenizer):
    class Killed(Exception):
        pass

    def kill(_: Any) -> dict[str, float]:
        raise Killed

    whole = imported.parent / "whole"
    shutil.copytree(imported.parent / "run", whole)
    go_on(imported, corpus, tokenizer, "name=whole")
    for step in (3, 5):
        with pytest.raises(Killed):
            go_on(imported, corpus, tokenizer, f"evaluation.every={step}", evaluate=kill)
    go_on(imported, corpus, tokenizer)
    assert_same_params(open_run(imported.parent / "run").params, open_run(whole).params)


def test_imported_weights_bind_the_model_alone(imported):
    free = ["seed=4", "model.dropout=0.5", "model.dtype=bfloat16", "train.batch_size=2", "optimizer.rule=authors"]
    check_run(load_config(imported, free), allow_changes=False)
    with pytest.raises(UserError) as error:
        check_run(load_config(imported, ["model.num_layers=2", "seed=4"]), allow_changes=False)
    assert "model.num_layers: 3 there, 2 now" in str(error.value) and "seed" not in str(error.value)


def test_another_tokenizer_is_refused(imported, corpus, tokenizer):
    other = FastTokenizer(fast_tokenizer_json(tokenizer))
    with pytest.raises(UserError, match="its tokenizer is not the one"):
        go_on(imported, corpus, other)


def test_the_checkpoint_has_no_optimizer(imported):
    run_dir = imported.parent / "run"
    with Checkpoints(run_dir) as checkpoints:
        assert checkpoints.latest() == 0
        assert checkpoints.read_files(0).corpus is None
    assert sorted(path.name for path in (run_dir / "checkpoints" / "0").iterdir() if path.is_dir()) == ["params", "run"]


def test_a_fast_tokenizer_comes_back_byte_by_byte(run, tmp_path):
    fast = FastTokenizer(fast_tokenizer_json(run.tokenizer))
    export_huggingface(dataclasses.replace(run, tokenizer=fast), tmp_path / "model", {}, 10**9)
    import_run(tmp_path / "model", tmp_path / "run")
    assert open_run(tmp_path / "run").tokenizer.fingerprint == fast.fingerprint
