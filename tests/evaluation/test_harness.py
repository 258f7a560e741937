"""The public harness over a run, beside the same harness over the exported folder, driven by transformers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from gpt1_jax.config import Config, EvaluationConfig, ModelConfig
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.errors import UserError
from gpt1_jax.evaluation import harness
from gpt1_jax.evaluation.harness import HarnessModel
from gpt1_jax.interop.huggingface import export_huggingface
from gpt1_jax.text.sentencepiece import SentencePieceTokenizer
from gpt1_jax.training.mesh import make_mesh
from gpt1_jax.training.run import Run

MODEL = ModelConfig(
    vocab_size=320, context_length=48, num_layers=2, embed_dim=32, num_heads=4, mlp_dim=128, dtype="float32"
)
WORDS = ("the cat", "a dog", "birds sing", "over the hill", "the mat", "far away", "the day begins", "ran")

CHOICES = """
task: choices
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
LAST_WORDS = """
task: last_words
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: perplexity}, {metric: acc}]
"""
TEXTS = """
task: texts
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
ANSWERS = """
task: answers
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 20, do_sample: false}
metric_list: [{metric: exact_match}]
"""


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model runs no faster on more, and JAX has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def run(corpus: Corpus, draw_params) -> Run:
    config = Config(model=MODEL, evaluation=EvaluationConfig(batch_size=4, sample_tokens=4))
    params = draw_params(MODEL, 0.2)
    kernel = params["embedding"]["token_kernel"]
    # The pieces of single bytes are short vectors, never the likeliest: what is generated is text.
    params["embedding"]["token_kernel"] = kernel.at[3:259].multiply(0.1)
    tokenizer = SentencePieceTokenizer(corpus.tokenizer_file.read_bytes())
    return Run(Path("runs/made"), config, 0, 0, None, tokenizer, make_mesh(config.mesh), params)


@pytest.fixture(scope="module")
def theirs(run: Run, tmp_path_factory: pytest.TempPathFactory) -> HFLM:
    folder = tmp_path_factory.mktemp("exported") / "model"
    export_huggingface(run, folder, {}, 10**9)
    # One at a time: the public class counts positions from the first column, padding or not.
    return HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def tasks(run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tasks of every kind, the right answers to half of the questions what the model itself would say."""
    folder = tmp_path_factory.mktemp("tasks")
    rng = np.random.default_rng(0)
    phrase = lambda count: " ".join(rng.choice(WORDS, count))  # noqa: E731
    questions = [phrase(rng.integers(1, 12)) for _ in range(12)]
    instances = [Instance("generate_until", {}, (q, {"max_gen_toks": 1, "until": []}), 0) for q in questions]
    said = HarnessModel(run).generate_until(instances)
    rows = [
        {
            "question": question,
            "choices": [" " + phrase(rng.integers(1, 4)) for _ in range(3)],
            "label": int(rng.integers(3)),
            "answer": answer if number % 2 and answer.strip() else f" {phrase(1)}",
            "text": phrase(rng.integers(1, 40)),
        }
        for number, (question, answer) in enumerate(zip(questions, said, strict=True))
    ]
    data = folder / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {}
    for name, content in {"choices": CHOICES, "last_words": LAST_WORDS, "texts": TEXTS, "answers": ANSWERS}.items():
        dataset = f"dataset_kwargs: {{data_files: {{test: '{data}'}}, cache_dir: '{folder}'}}\ntest_split: test\n"
        paths[name] = folder / f"{name}.yaml"
        paths[name].write_text(f"{content}dataset_path: json\n{dataset}")
    return paths


@pytest.fixture(scope="module")
def results(run: Run, theirs: HFLM, tasks: dict[str, Path]) -> tuple[dict[str, Any], dict[str, Any]]:
    paths, manager = [str(path) for path in tasks.values()], TaskManager(include_defaults=False)

    def ask(model: Any) -> dict[str, Any]:
        return simple_evaluate(model=model, tasks=paths, task_manager=manager, bootstrap_iters=0)

    return ask(HarnessModel(run)), ask(theirs)


def answers(found: dict[str, Any], task: str) -> list[Any]:
    """What the model said to every request of a task, in their order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [answer[0] if isinstance(answer, list) else answer for sample in samples for answer in sample["resps"]]


@pytest.mark.parametrize("task", ["choices", "last_words", "texts"])
def test_log_probabilities_are_those_of_transformers(results, task):
    ours, theirs = (answers(found, task) for found in results)
    assert len(ours) == {"choices": 36, "last_words": 12, "texts": 12}[task]
    if task == "texts":
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)
        return
    np.testing.assert_allclose([nats for nats, _ in ours], [nats for nats, _ in theirs], rtol=0, atol=1e-4)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]


def test_generated_texts_are_those_of_transformers(results):
    ours, theirs = (answers(found, "answers") for found in results)
    assert ours == theirs
    assert sum(map(bool, ours)) > 6


@pytest.mark.parametrize("task", ["choices", "last_words", "texts", "answers"])
def test_metrics_are_those_of_transformers(results, task):
    ours, theirs = (found["results"][task] for found in results)
    numbers = {name for name, value in theirs.items() if isinstance(value, float)}
    assert numbers
    for name in numbers:
        np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=name)


def test_the_tasks_tell_right_from_wrong(results):
    found, _ = results
    for task, metric in (("choices", "acc,none"), ("last_words", "acc,none")):
        assert 0 < found["results"][task][metric] < 1


def generate(run: Run, contexts: list[str], seed: int = 0, **settings: Any) -> list[str]:
    requests = [Instance("generate_until", {}, (context, settings), 0) for context in contexts]
    return HarnessModel(run, batch_size=2, seed=seed).generate_until(requests)


def test_sampling_has_a_seed_and_draws_anew_for_each_request(run):
    settings = {"do_sample": True, "temperature": 1.5, "top_k": 30, "max_gen_toks": 8, "until": []}
    first = generate(run, ["the cat"] * 4, **settings)
    assert len(set(first)) == 4
    assert generate(run, ["the cat"] * 4, **settings) == first
    assert not set(generate(run, ["the cat"] * 4, seed=9, **settings)) & set(first)


def test_requests_are_answered_in_their_order_whatever_their_settings(run):
    contexts = ["the cat ran far away", "a dog", "birds sing over the hill"]
    requests = [(context, {"max_gen_toks": tokens, "until": []}) for tokens in (4, 9) for context in contexts]
    mixed = [requests[index] for index in (3, 0, 4, 1, 5, 2)]
    alone = [generate(run, [context], **settings)[0] for context, settings in mixed]
    together = [Instance("generate_until", {}, request, 0) for request in mixed]
    assert HarnessModel(run, batch_size=2).generate_until(together) == alone
    assert all(longer.startswith(shorter) for longer, shorter in zip(alone[::2], alone[1::2], strict=True))


def test_a_kind_of_decoding_that_there_is_not_is_refused(run):
    with pytest.raises(UserError, match=r"generation_kwargs num_beams: .* it takes until, max_gen_toks"):
        generate(run, ["the cat"], until=[], num_beams=4)


def test_a_text_of_nothing_costs_nothing(run):
    assert HarnessModel(run).loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("",), 0)]) == [0.0]


def test_the_command_asks_tasks_of_the_harness(gpt1, run, tasks, results, monkeypatch):
    monkeypatch.setattr("gpt1_jax.training.run.open_run", lambda path: run)
    # Those that lm-eval brings are thousands of files.
    monkeypatch.setattr(harness, "TaskManager", lambda: TaskManager(include_defaults=False))
    code, out, _ = gpt1("evaluate", "runs/made", "--harness", tasks["choices"], "--json")
    assert code == 0
    found = json.loads(out)["tasks"]["choices"]
    expected = results[0]["results"]["choices"]
    assert {name: found[name] for name in ("acc,none", "acc_norm,none")} == {
        name: expected[name] for name in ("acc,none", "acc_norm,none")
    }
    code, out, _ = gpt1("evaluate", "runs/made", "--harness", tasks["choices"], "--limit", 3)
    assert code == 0
    assert out.startswith("choices: acc,none ")
    code, out, err = gpt1("evaluate", "runs/made", "--harness", "no_such_task")
    assert (code, out) == (2, "")
    assert "--harness no_such_task: lm-eval has no such task" in err


def test_the_model_is_known_to_the_harness_by_its_name():
    assert get_model("gpt1_jax") is HarnessModel


def test_without_the_extra_the_command_says_what_to_install(gpt1, monkeypatch):
    monkeypatch.delitem(sys.modules, "gpt1_jax.evaluation.harness")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, out, err = gpt1("evaluate", "runs/nowhere", "--harness", "piqa")
    assert (code, out) == (2, "")
    assert "pip install 'gpt1-jax[harness]'" in err
    assert err.count("\n") == 1
