"""The exported folder: what is in it, that the public library takes all of it, and what is refused."""

import dataclasses
import json
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from gpt1_jax.config import ModelConfig
from gpt1_jax.errors import UserError
from gpt1_jax.interop import huggingface
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.interop.huggingface import export_huggingface
from gpt1_jax.interop.layout import public_shapes, public_tensors
from gpt1_jax.interop.safetensors_files import write_weights
from gpt1_jax.model.transformer import num_parameters
from gpt1_jax.text.conversation import CHAT_TOKENS, END, chat_template
from gpt1_jax.text.fast_tokenizer import FastTokenizer

FIGURES = {
    "step": 7,
    "split": "validation",
    "documents": 12,
    "tokens": 3456,
    "perplexity": 17.25,
    "word_perplexity": 1234.5,
    "bits_per_byte": 1.5,
    "xz_bits_per_byte": 2.5,
}
TEXT = "The THE the <|endoftext|>  sat\n\n on ▁ the maté 漢 mat.\n"


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(dropout=0.25, attention_dropout=0.125)


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert export_huggingface(run, out, FIGURES, 10**9) == ["model.safetensors"]
    return out


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_the_files_are_those_of_the_public_library(exported, run):
    assert sorted(path.name for path in exported.iterdir()) == [
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    assert (exported / "tokenizer.model").read_bytes() == run.tokenizer.to_bytes()
    assert read(exported / "special_tokens_map.json") == {
        name: read(exported / "tokenizer_config.json")[name] for name in ("bos_token", "eos_token", "unk_token")
    }


def test_the_configuration_is_the_run_s(exported):
    found = read(exported / "config.json")
    assert {name: found[name] for name in ("n_positions", "n_embd", "n_layer", "n_head", "vocab_size")} == {
        "n_positions": 40,
        "n_embd": 48,
        "n_layer": 3,
        "n_head": 3,
        "vocab_size": 320,
    }
    assert (found["embd_pdrop"], found["resid_pdrop"], found["attn_pdrop"]) == (0.25, 0.25, 0.125)
    assert (found["model_type"], found["afn"], found["layer_norm_epsilon"]) == ("openai-gpt", "gelu", 1e-5)
    assert found["architectures"] == ["OpenAIGPTLMHeadModel"]


def test_the_tensors_have_the_public_names_and_the_head_is_not_stored(exported, run):
    with safe_open(exported / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F32"}
    assert names == {f"transformer.{name}" for name in public_shapes(run.config.model)}
    assert len(names) == 2 + 12 * 3
    tensors = load_file(exported / "model.safetensors")
    first = "transformer.h.1."
    assert tensors[first + "mlp.c_fc.weight"].shape == (48, 192)
    blocks = run.params["blocks"]
    # x W with queries, keys and values side by side: the library splits the result in three.
    x = np.random.default_rng(0).normal(size=48)
    found = x @ tensors[first + "attn.c_attn.weight"] + tensors[first + "attn.c_attn.bias"]
    for part, name in zip(np.split(found, 3), ("query", "key", "value"), strict=True):
        linear = blocks["attention"][name]
        expected = np.einsum("d,dnh->nh", x, linear["kernel"][1]) + linear["bias"][1]
        np.testing.assert_allclose(part, expected.reshape(-1), rtol=1e-5, atol=1e-5)


def test_the_full_size_has_146_tensors_and_the_papers_parameters():
    shapes = public_shapes(ModelConfig())
    assert len(shapes) == 146
    assert sum(int(np.prod(shape)) for shape in shapes.values()) == 116_534_784
    assert num_parameters(ModelConfig(dtype="float32")) == 116_534_784


def test_the_card_s_own_code_runs_without_ours_and_without_a_warning(exported):
    (code,) = re.findall(r"```python\n(.*?)```", (exported / "README.md").read_text(), re.DOTALL)
    code = "import sys; sys.modules['gpt1_jax'] = sys.modules['jax'] = None\n" + code
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The")
    told = [line for line in re.split(r"[\r\n]+", done.stderr) if line and not line.startswith("Loading weights:")]
    assert told == []


def test_every_weight_is_taken_and_none_is_made_up(exported, run):
    from transformers import AutoModelForCausalLM

    model, told = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(told.values()), told
    assert type(model).__name__ == "OpenAIGPTLMHeadModel"
    assert model.lm_head.weight is model.transformer.tokens_embed.weight
    assert model.transformer.h[0].mlp.act.__class__.__name__ == "NewGELUActivation"  # the tanh form
    state = model.state_dict()
    for name, tensor in public_tensors(run.params):
        np.testing.assert_array_equal(state[f"transformer.{name}"].numpy(), tensor)


def test_the_public_tokenizer_gives_the_same_tokens_and_nothing_more(exported, run):
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(exported)
    found = tokenizer(TEXT)
    assert set(found) == {"input_ids", "attention_mask"}  # token_type_ids would be embedded
    assert found["input_ids"] == run.tokenizer.encode(TEXT).tolist()
    assert tokenizer.decode(found["input_ids"]) == TEXT
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == run.tokenizer.separator_id
    assert tokenizer.model_max_length == 32


def test_an_answer_of_a_conversation_ends_where_its_message_does(make_run, tmp_path):
    made = make_run(vocab_size=320 + len(CHAT_TOKENS))
    tokenizer = made.tokenizer.with_special_tokens(CHAT_TOKENS)
    run = dataclasses.replace(made, tokenizer=tokenizer, chat_template=chat_template(tokenizer))
    export_huggingface(run, tmp_path / "out", {}, 10**9)
    generation = json.loads((tmp_path / "out/generation_config.json").read_text())
    assert generation["eos_token_id"] == run.tokenizer.special_id(END)
    assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["chat_template"] == run.chat_template


@pytest.mark.parametrize(("max_bytes", "count"), [(10**9, 1), (120_000, 4), (1, 38)])
def test_shards(run, tmp_path, max_bytes, count):
    files = export_huggingface(run, tmp_path / "out", {}, max_bytes)
    assert len(files) == count
    expected = dict(public_tensors(run.params))
    found = {}
    for file in files:
        shard = load_file(tmp_path / "out" / file)
        assert sum(tensor.nbytes for tensor in shard.values()) <= max_bytes or len(shard) == 1
        found |= shard
    assert {name.removeprefix("transformer.") for name in found} == set(expected)
    if count > 1:
        index = read(tmp_path / "out" / "model.safetensors.index.json")
        assert files[0] == f"model-00001-of-{count:05}.safetensors"
        assert list(index["weight_map"]) == [f"transformer.{name}" for name in expected]
        assert set(index["weight_map"].values()) == set(files)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in expected.values())


def test_the_public_library_loads_shards(run, tmp_path):
    from transformers import AutoModelForCausalLM

    export_huggingface(run, tmp_path / "out", {}, 120_000)
    model, told = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(told.values()), told
    state = model.state_dict()
    for name, tensor in public_tensors(run.params):
        np.testing.assert_array_equal(state[f"transformer.{name}"].numpy(), tensor)


def test_no_more_than_one_shard_is_in_memory(tmp_path):
    shapes = {f"t{number}": (1000,) for number in range(50)}
    alive: list[weakref.ref] = []

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, shape in shapes.items():
            tensor = np.zeros(shape, np.float32)
            alive.append(weakref.ref(tensor))
            assert sum(reference() is not None for reference in alive) <= 10 + 1
            yield name, tensor

    write_weights(tmp_path, shapes, tensors(), 40_000)
    assert len(alive) == 50 and len(list(tmp_path.glob("*.safetensors"))) == 5


def test_the_card_has_the_run_s_figures(exported, run):
    card = (exported / "README.md").read_text()
    for told in (f"{num_parameters(run.config.model):,}", "1,792", "`made`, 7", f"`{'f' * 16}`", "17.25", "1,234.50"):
        assert told in card, told
    assert run.tokenizer.fingerprint in card
    assert "1.5000 (xz -9: 2.5000)" in card and "12 documents" in card


def test_figures_of_another_step_are_left_out(run, tmp_path):
    export_huggingface(run, tmp_path / "out", FIGURES | {"step": 6}, 10**9)
    assert "None were recorded" in (tmp_path / "out" / "README.md").read_text()


def test_a_folder_that_holds_something_is_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: exists already"):
        export_huggingface(run, tmp_path / "out", {}, 10**9)
    with pytest.raises(UserError, match=r"notes\.txt: exists already"):
        export_huggingface(run, tmp_path / "out" / "notes.txt", {}, 10**9)
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]


def test_an_empty_folder_is_taken(run, tmp_path):
    (tmp_path / "out").mkdir()
    export_huggingface(run, tmp_path / "out", {}, 10**9)
    assert (tmp_path / "out" / "config.json").exists()


def test_a_failure_leaves_nothing(run, tmp_path, monkeypatch):
    def fail(*_: Any) -> str:
        assert (tmp_path / ".out.partial" / "model.safetensors").exists()
        assert not (tmp_path / "out").exists()
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface, "model_card", fail)
    with pytest.raises(KeyboardInterrupt):
        export_huggingface(run, tmp_path / "out", {}, 10**9)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_export_left_is_not_taken_over(run, tmp_path):
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "model-00001-of-00002.safetensors").write_text("half")
    export_huggingface(run, tmp_path / "out", {}, 10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not list((tmp_path / "out").glob("model-*"))


def test_what_the_public_class_cannot_be_is_refused_by_name(make_run, variation, tmp_path):
    sizes = {"vocab_size", "context_length", "num_layers", "embed_dim", "num_heads", "mlp_dim"}
    free = {"dropout", "attention_dropout", "dtype"}
    names = [name for name, value in variation if value != ModelConfig.model_fields[name].default]
    names = [name for name in names if name not in sizes | free]
    run = make_run()
    config = run.config.model_copy(update={"model": variation})
    with pytest.raises(UserError) as error:
        export_huggingface(dataclasses.replace(run, config=config), tmp_path / "out", {}, 10**9)
    assert names and list(tmp_path.iterdir()) == []
    found = re.findall(r"model\.(\w+)=(\w+)", str(error.value))
    assert [name for name, _ in found] == [*sorted(names, key=list(ModelConfig.model_fields).index), "mlp_dim"]
    assert dict(found)["mlp_dim"] == "48"


def test_as_many_heads_of_keys_as_of_queries_are_the_papers(make_run, tmp_path):
    export_huggingface(make_run(num_kv_heads=3), tmp_path / "out", {}, 10**9)


def test_a_tokenizer_of_the_public_library_goes_out_as_it_is(run, tmp_path):
    content = fast_tokenizer_json(run.tokenizer)
    export_huggingface(dataclasses.replace(run, tokenizer=FastTokenizer(content)), tmp_path / "out", {}, 10**9)
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == content
    assert not (tmp_path / "out" / "tokenizer.model").exists()
