"""Functions in StableHLO: the same logits, any batch and length, and nothing but JAX to call them."""

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from gpt1_jax.errors import UserError
from gpt1_jax.generation.decode import generate
from gpt1_jax.generation.sampling import GREEDY
from gpt1_jax.interop.stablehlo import export_stablehlo
from gpt1_jax.model.objective import prefix_mask
from gpt1_jax.model.transformer import bind
from gpt1_jax.text.tokenizer import read_tokenizer

# What a process that calls them must not need: our code, and the libraries that it stands on.
OURS = ("gpt1_jax", "flax", "orbax", "optax", "safetensors", "sentencepiece", "tokenizers", "torch", "transformers")


class Exported:
    """The functions of an exported folder, as its README loads them."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.manifest = json.loads((folder / "manifest.json").read_text())
        with np.load(folder / "weights.npz") as archive:
            self.weights = {name: archive[name] for name in archive}
        self.functions = {}
        for name, function in self.manifest["functions"].items():
            content = (folder / function["file"]).read_bytes()
            self.functions[name] = jax.jit(export.deserialize(bytearray(content)).call)

    def __call__(self, name: str, *arguments: Any) -> Any:
        return self.functions[name](self.weights, *arguments)

    def cache(self, batch: int, slots: int) -> dict[str, jax.Array]:
        spec = self.manifest["functions"]["decode"]["arguments"]["cache"]["k"]
        layers, _, _, heads, size = spec["shape"]
        return {part: jnp.zeros((layers, batch, slots, heads, size), spec["dtype"]) for part in ("k", "v")}


@pytest.fixture(scope="module")
def run(make_run):
    return make_run(std=0.05, scan_layers=True)  # compiles sooner


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert export_stablehlo(run, out) == ["forward", "decode"]
    return Exported(out)


def tokens_of(run, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(rows).integers(0, run.config.model.vocab_size, (rows, length), dtype=np.int32)


def our_logits(run, tokens_BT: np.ndarray, mask_BTS: Any = None) -> np.ndarray:
    def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
        model = bind(run.config.model, params)
        return model.logits(model(tokens_BT, mask_BTS=mask_BTS)[0])

    return np.asarray(jax.jit(forward)(run.params, tokens_BT))


def test_the_readme_s_own_code_runs_on_plain_jax(exported):
    (code,) = re.findall(r"```python\n(.*?)```", (exported.folder / "README.md").read_text(), re.DOTALL)
    code = f"import sys; sys.modules.update(dict.fromkeys({OURS}))\n" + code
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=exported.folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    shape, *steps = done.stdout.splitlines()
    assert shape == "(2, 5, 320)"
    assert [line.split()[0] for line in steps] == ["5", "6", "7", "8"]


@pytest.mark.parametrize(("rows", "length"), [(1, 1), (3, 17), (2, 40)])
def test_forward_gives_our_logits(exported, run, rows, length):
    tokens_BT = tokens_of(run, rows, length)
    ours = our_logits(run, tokens_BT)
    assert 0.3 < ours.std() < 1
    np.testing.assert_allclose(exported("forward", tokens_BT), ours, rtol=0, atol=1e-6)


def test_forward_refuses_what_is_longer_than_the_context(exported, run):
    with pytest.raises(ValueError, match="refining shapes"):
        exported("forward", tokens_of(run, 1, 41))


def test_decode_gives_our_tokens_from_padded_prompts(exported, run):
    prompts = [tokens_of(run, 1, length)[0] for length in (7, 2, 5)]
    width, new = 7, 20
    never = run.config.model.vocab_size  # a separator that is never drawn
    ours = generate(run.config, run.params, prompts, sampling=GREEDY, max_tokens=new, seed=0, separator_id=never)
    pads = np.array([width - len(prompt) for prompt in prompts], np.int32)
    padded = np.stack([np.pad(prompt, (pad, 0)) for prompt, pad in zip(prompts, pads, strict=True)])
    logits, cache = exported("decode", exported.cache(3, width + new), padded, np.int32(0), pads)
    drawn = []
    for slot in range(width, width + new):
        drawn.append(np.asarray(logits.argmax(-1), np.int32))
        logits, cache = exported("decode", cache, drawn[-1][:, None], np.int32(slot), pads)
    assert np.stack(drawn, 1).tolist() == [completion.tokens.tolist() for completion in ours]


def check_decode(exported: Exported, run, mask_of_prompt: Any) -> None:
    """One call for the prompt, one for each token after it: the logits of the whole text at once."""
    tokens_BT = tokens_of(run, 2, 12)
    ours = our_logits(run, tokens_BT, mask_of_prompt)
    none = np.zeros(2, np.int32)
    logits, cache = exported("decode", exported.cache(2, 15), tokens_BT[:, :8], np.int32(0), none)
    np.testing.assert_allclose(logits, ours[:, 7], rtol=0, atol=1e-6)
    for slot in range(8, 12):
        logits, cache = exported("decode", cache, tokens_BT[:, slot : slot + 1], np.int32(slot), none)
        np.testing.assert_allclose(logits, ours[:, slot], rtol=0, atol=1e-6)


def test_decode_gives_our_logits(exported, run):
    check_decode(exported, run, None)


@pytest.mark.parametrize("variation_name", ["prefix modern", "masked modern"])
def test_other_architectures(make_run, variations, variation_name, tmp_path):
    variation = variations[variation_name]
    run = make_run(std=0.05, **(variation.model_dump() | {"scan_layers": True}))
    functions = export_stablehlo(run, tmp_path / "out")
    exported = Exported(tmp_path / "out")
    assert functions == list(exported.manifest["functions"])
    assert functions == (["forward"] if variation.objective == "masked" else ["forward", "decode"])
    tokens_BT = tokens_of(run, 2, 12)
    if variation.objective == "masked":
        tokens_BT[:, ::3] = variation.mask_id
        assert str(variation.mask_id) in (tmp_path / "out" / "README.md").read_text()
    np.testing.assert_allclose(exported("forward", tokens_BT), our_logits(run, tokens_BT), rtol=0, atol=1e-6)
    if variation.objective == "prefix":
        check_decode(exported, run, prefix_mask(jnp.array([8, 8]), 12))


def test_the_manifest_says_what_goes_in_and_comes_out(exported, run):
    manifest = exported.manifest
    assert manifest["platforms"] == ["cpu", "tpu", "cuda"]
    cache = {"shape": [3, "b", "s", 3, 16], "dtype": "float32"}
    assert manifest["functions"]["decode"]["arguments"] == {
        "weights": "weights.npz",
        "cache": {"k": cache, "v": cache},
        "tokens": {"shape": ["b", "t"], "dtype": "int32"},
        "slot": {"shape": [], "dtype": "int32"},
        "pads": {"shape": ["b"], "dtype": "int32"},
    }
    assert manifest["functions"]["decode"]["results"] == {
        "logits": {"shape": ["b", 320], "dtype": "float32"},
        "cache": {"k": cache, "v": cache},
    }
    assert manifest["functions"]["forward"]["results"] == {"logits": {"shape": ["b", "t", 320], "dtype": "float32"}}
    stored = {name: {"shape": list(w.shape), "dtype": str(w.dtype)} for name, w in exported.weights.items()}
    assert manifest["weights"] == stored
    assert sum(weight.size for weight in exported.weights.values()) == sum(
        leaf.size for leaf in jax.tree.leaves(run.params)
    )


def test_the_platforms_are_those_of_the_manifest_and_the_weights_are_outside(exported):
    for function in exported.manifest["functions"].values():
        content = (exported.folder / function["file"]).read_bytes()
        assert export.deserialize(bytearray(content)).platforms == ("cpu", "tpu", "cuda")
        assert len(content) < 100_000 < sum(weight.nbytes for weight in exported.weights.values())


def test_the_tokenizer_goes_with_it(exported, run):
    assert read_tokenizer(exported.folder / "tokenizer.model").fingerprint == run.tokenizer.fingerprint
    assert exported.manifest["tokenizer_fingerprint"] == run.tokenizer.fingerprint


def test_bfloat16_products(exported, run, tmp_path):
    export_stablehlo(run, tmp_path / "out", "bfloat16")
    narrow = Exported(tmp_path / "out")
    assert {weight.dtype for weight in narrow.weights.values()} == {np.dtype(np.float32)}
    assert narrow.cache(1, 1)["k"].dtype == jnp.bfloat16
    tokens_BT = tokens_of(run, 2, 9)
    config = run.config.model_copy(update={"model": run.config.model.model_copy(update={"dtype": "bfloat16"})})
    ours = our_logits(dataclasses.replace(run, config=config), tokens_BT)
    found = narrow("forward", tokens_BT)
    assert found.dtype == jnp.float32
    # Sums in another order, each rounded to eight bits.
    np.testing.assert_allclose(found, ours, rtol=0, atol=0.02)
    assert np.abs(found - exported("forward", tokens_BT)).max() > 1e-3


def test_a_folder_that_holds_something_is_left_as_it_is(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="out: exists already"):
        export_stablehlo(run, tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "notes.txt"]
