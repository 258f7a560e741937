"""What auto stands for on each platform, and that it never changes the mathematics."""

import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import UserError
from gpt1_jax.training import choices
from gpt1_jax.training.choices import resolve


def chosen(platform: str, *overrides: str) -> dict[str, str | int]:
    config, found = resolve(parse_config("", "c", list(overrides)), platform)
    for choice in found:
        section, key = choice.key.split(".")
        assert getattr(getattr(config, section), key) == choice.value
        assert choice.reason and choice.key in str(choice)
    return {choice.key: choice.value for choice in found}


@pytest.mark.parametrize(("platform", "kernel"), [("tpu", "splash"), ("gpu", "cudnn")], ids=["tpu", "gpu"])
def test_an_accelerator_has_its_kernel_where_nothing_is_dropped(platform, kernel):
    assert chosen(platform, "model.attention_dropout=0") == {
        "model.dtype": "bfloat16",
        "model.attention": kernel,
        "model.loss_chunk": 512,
        "train.gradient_dtype": "bfloat16",
    }


@pytest.mark.parametrize("amx", [True, False])
def test_a_cpu(amx, monkeypatch):
    monkeypatch.setattr(choices, "cpu_multiplies_bfloat16", lambda: amx)
    assert chosen("cpu") == {
        "model.dtype": "bfloat16" if amx else "float32",
        "model.attention": "xla",
        "model.loss_chunk": 128,
        "train.gradient_dtype": "float32",
    }


@pytest.mark.parametrize("platform", ["tpu", "gpu"])
@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("model.attention_dropout=0.1", "model.attention_dropout=0.1"),
        ("model.objective=prefix", "model.objective=prefix"),
        ("mesh.sequence=2", "mesh.sequence=2"),
    ],
)
def test_the_plain_form_is_taken_where_a_kernel_cannot_do_the_same(platform, override, named):
    _, found = resolve(parse_config("", "c", ["model.attention_dropout=0", override]), platform)
    choice = next(choice for choice in found if choice.key == "model.attention")
    assert choice.value == "xla"
    assert named in choice.reason


def test_what_the_shapes_do_not_allow_is_said():
    _, found = resolve(parse_config("", "c", ["model.attention_dropout=0", "train.context_length=500"]), "tpu")
    assert "500 tokens" in next(choice.reason for choice in found if choice.key == "model.attention")
    _, found = resolve(parse_config("", "c", ["model.attention_dropout=0", "model.dtype=float32"]), "gpu")
    assert "model.dtype is float32" in next(choice.reason for choice in found if choice.key == "model.attention")


def test_what_is_given_is_left():
    given = ["model.dtype=float32", "model.attention=xla", "model.loss_chunk=64", "train.gradient_dtype=bfloat16"]
    assert chosen("tpu", *given) == {}


def test_float32_gradients_of_float32_products():
    assert chosen("tpu", "model.dtype=float32")["train.gradient_dtype"] == "float32"


@pytest.mark.parametrize(("kernel", "platform"), [("splash", "gpu"), ("splash", "cpu"), ("cudnn", "tpu")])
def test_a_kernel_of_another_platform_is_refused(kernel, platform):
    config = parse_config("", "c", ["model.attention_dropout=0", f"model.attention={kernel}"])
    with pytest.raises(UserError, match=f"model.attention={kernel}: it runs on"):
        resolve(config, platform)


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_a_kernel_is_refused_where_it_would_have_to_drop(kernel):
    with pytest.raises(UserError, match=rf"model\.attention={kernel} cannot drop .*attention_dropout=0\.1"):
        parse_config("", "c", [f"model.attention={kernel}"])
