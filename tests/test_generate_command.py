"""The forms of ``gpt1 generate`` that a pre-trained run has not: a source, a conversation, and beam search."""

import io
import json
from pathlib import Path
from typing import Any

import jax
import pytest

from gpt1_jax.config import CheckpointConfig, Config, ModelConfig
from gpt1_jax.config_file import parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.generation.prompts import new_tokens, prompt_ids
from gpt1_jax.model.transformer import init_params
from gpt1_jax.text.conversation import CHAT_TOKENS, chat_template
from gpt1_jax.text.special_tokens import DELIMITER, START
from gpt1_jax.text.tokenizer import Tokenizer
from gpt1_jax.training.checkpoint import Checkpoints, RunFiles
from gpt1_jax.training.run import write_config

TABLE = {"kind": "toy_language", "split": "train"}
TASKS: dict[str, dict[str, Any]] = {
    "text_to_text": {"source": "english", "target": "toy", "target_tokens": 12},
    "chat": {"answer_tokens": 5},
    "beams": {"source": "english", "target": "toy", "target_tokens": 12, "beams": 3, "length_penalty": 1.5},
}


@pytest.fixture(scope="module")
def runs(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Config, Tokenizer]]:
    """A run of random weights of each form, as fine-tuning would leave it."""
    folder, made = tmp_path_factory.mktemp("runs"), {}
    for form, keys in TASKS.items():
        tokenizer = corpus.tokenizer().with_special_tokens([START, DELIMITER, *CHAT_TOKENS])
        task = {
            "form": "text_to_text" if form == "beams" else form,
            "train": TABLE,
            "validation": TABLE | {"split": "validation"},
            **keys,
        }
        model = ModelConfig(
            vocab_size=tokenizer.vocab_size, context_length=32, num_layers=1, embed_dim=16, num_heads=2, mlp_dim=16,
            dtype="float32",
        )  # fmt: skip
        plain = parse_config("evaluation: {sample_tokens: 4}", "test").model_dump(mode="json")
        config = Config.model_validate_json(
            json.dumps(
                plain | {"name": form, "runs_dir": str(folder), "model": model.model_dump(), "finetune": {"task": task}}
            )
        )
        write_config(config)
        with Checkpoints(config.run_dir, CheckpointConfig()) as checkpoints:
            template = chat_template(tokenizer) if form == "chat" else None
            files = RunFiles(config.to_yaml(), tokenizer.to_bytes(), 0, None, None, template)
            checkpoints.save_imported(jax.tree.map(lambda x: x * 10, init_params(model, jax.random.key(0))), files)
        made[form] = (folder / form, config, tokenizer)
    return made


def test_a_source_is_put_in_the_form_of_the_training(runs):
    _, config, tokenizer = runs["text_to_text"]
    start, delimiter = tokenizer.special_id(START), tokenizer.special_id(DELIMITER)
    source = tokenizer.encode("The cat sat.").tolist()
    assert prompt_ids(config, tokenizer, "The cat sat.", 12).tokens.tolist() == [start, *source, delimiter]
    assert prompt_ids(config, tokenizer, "", 12).tokens.tolist() == [start, delimiter]
    # The context of 32 holds a target of twelve, the two tokens around the source, and so eighteen of the source.
    long = tokenizer.encode("z" * 40).tolist()
    for tokens, kept in ((1, 18), (12, 18), (20, 10)):
        prompt = prompt_ids(config, tokenizer, "z" * 40, tokens)
        assert prompt.tokens.tolist() == [start, *long[:kept], delimiter] and prompt.dropped == len(long) - kept
    assert prompt_ids(config, tokenizer, "_delimiter_", 12).tokens.tolist().count(delimiter) == 1


def test_how_many_tokens_are_new_is_what_the_task_says(runs):
    assert [new_tokens(runs[form][1]) for form in TASKS] == [12, 5, 12]
    assert new_tokens(Config()) == 64


def test_a_target_is_printed_alone(runs, gpt1):
    path, _, _ = runs["text_to_text"]
    found = json.loads(gpt1("generate", path, "The cat", "--temperature", 0, "--json").out)
    assert found["prompt"] == "The cat" and 0 < found["tokens"] <= 12
    assert gpt1("generate", path, "The cat", "--temperature", 0).out == found["completion"] + "\n"
    cut = gpt1("generate", path, "z" * 40, "--temperature", 0)
    assert "has 40 tokens, the context has room for 18: its end is cut off" in cut.err


def test_beams(runs, gpt1):
    path, _, _ = runs["text_to_text"]
    greedy = json.loads(gpt1("generate", path, "The cat", "--temperature", 0, "--json").out)
    one = json.loads(gpt1("generate", path, "The cat", "--beams", 1, "--json").out)
    assert list(one) == ["prompt", "completion", "tokens", "score", "seconds"]
    assert one["completion"] == greedy["completion"] and one["tokens"] == greedy["tokens"]
    shown = gpt1("generate", path, "The cat", "--beams", 1, "--length-penalty", 2)
    assert shown.out == one["completion"] + "\n"


def test_a_task_with_beams_is_searched_unless_one_draws(runs, gpt1):
    path, _, _ = runs["beams"]

    def found(*options):
        return json.loads(gpt1("generate", path, "The cat", *options, "--json").out)

    asked = found("--beams", 3, "--length-penalty", 1.5)
    assert {**found(), "seconds": 0} == {**asked, "seconds": 0} and "score" in asked
    assert found("--beams", 3)["score"] == asked["score"] != found("--beams", 3, "--length-penalty", 0)["score"]
    assert found("--beams", 1)["completion"] == found("--temperature", 0)["completion"]
    assert "score" not in found("--temperature", 0)


def test_a_conversation_through_a_pipe(runs, gpt1, monkeypatch):
    path, _, _ = runs["chat"]

    def talk(*options: object) -> Any:
        monkeypatch.setattr("sys.stdin", io.StringIO("The cat?\n/reset\n\nA dog?\nBirds?\n"))
        return gpt1("generate", path, "--chat", "--temperature", 0, *options)

    found = json.loads(talk("--json").out)
    assert list(found) == ["messages", "tokens", "seconds"]
    assert [message["role"] for message in found["messages"]] == ["user", "assistant"] * 2
    assert [message["content"] for message in found["messages"][::2]] == ["A dog?", "Birds?"]
    assert 0 < found["tokens"] <= 3 * 5
    shown = talk()
    assert shown.code == 0 and ">" not in shown.err
    assert shown.out.endswith("\n".join([*(m["content"] for m in found["messages"][1::2]), ""]))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "PROMPT is missing"),
        (["The", "--chat"], "PROMPT 'The' and --chat exclude each other"),
        (["The", "--length-penalty", 1], "--length-penalty 1.0 is of beam search alone"),
        (["The", "--beams", 2, "--top-k", 3, "--seed", 0], "--beams 2 and --top-k, --seed exclude each other"),
        (["--beams", 2, "--chat"], "--beams 2 and --chat exclude each other"),
        (["The", "--beams", 0], "beams=0: must be at least 1"),
        (["The", "--beams", 2, "--length-penalty", "-1"], "length_penalty=-1.0: must be at least 0"),
    ],
)
def test_options_that_do_not_go_together_are_refused_before_any_work(gpt1, arguments, told):
    result = gpt1("generate", "no/such/run", *arguments)
    assert result.code == 2 and result.out == "" and told in result.err
    assert len(result.err.splitlines()) == 1


def test_a_source_needs_room(runs, gpt1):
    result = gpt1("generate", runs["text_to_text"][0], "The", "--tokens", 30)
    assert result.code == 2 and "leave no room for a source" in result.err
