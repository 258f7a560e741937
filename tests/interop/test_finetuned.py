"""Fine-tuned runs in other formats: every form gives our scores, from the text on."""

import dataclasses
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
import transformers

from gpt1_jax.config import FinetuneConfig
from gpt1_jax.data.examples import Choices, Conversation, Labelled, Pair
from gpt1_jax.errors import UserError
from gpt1_jax.finetuning.dataset import Batch, Dataset
from gpt1_jax.finetuning.forms import encode, special_tokens
from gpt1_jax.finetuning.loss import task_scores
from gpt1_jax.interop.fast_conversion import fast_tokenizer_json
from gpt1_jax.interop.finetuned import merged_run
from gpt1_jax.interop.huggingface import export_huggingface
from gpt1_jax.interop.importing import import_run
from gpt1_jax.interop.stablehlo import export_stablehlo
from gpt1_jax.model.transformer import bind
from gpt1_jax.text.conversation import CHAT_TOKENS, Message, chat_template, encode_prompt
from gpt1_jax.text.fast_tokenizer import FastTokenizer
from gpt1_jax.training.run import Run, open_run

TABLE = {"kind": "toy_dialogue", "split": "validation"}
LABELLED = {"label": "label", "validation": TABLE}
NUMBERS = LABELLED | {"metrics": ["pearson"]}
MOODS = LABELLED | {"labels": ["happy", "sad", "angry"]}
TASKS: dict[str, dict[str, Any]] = {
    "classification": {"form": "classification", "text": "text", **MOODS},
    "entailment": {"form": "entailment", "premise": "a", "hypothesis": "b", **MOODS},
    "similarity": {"form": "similarity", "first": "a", "second": "b", **NUMBERS},
    "multiple_choice": {
        "form": "multiple_choice",
        "context": "c",
        "question": "q",
        "answers": "a",
        "label": "label",
        "validation": TABLE,
    },
    "text_to_text": {"form": "text_to_text", "source": "s", "target": "t", "target_tokens": 16, "validation": TABLE},
    "chat": {"form": "chat", "answer_tokens": 6, "validation": TABLE},
}
CLASSES = {"classification": 3, "entailment": 3, "similarity": 1, "multiple_choice": 1}
CLASSIFIERS = tuple(CLASSES)
TEXTS = ("The cat  sat.", "A dog ran over the hill, far away.\n", "the _classify_ <|end|> token")
EXAMPLES: dict[str, list[Any]] = {
    "classification": [Labelled((text,), 0) for text in TEXTS],
    "entailment": [Labelled((text, TEXTS[number - 1]), 0) for number, text in enumerate(TEXTS)],
    "similarity": [Labelled((text, TEXTS[number - 1]), 0.5) for number, text in enumerate(TEXTS)],
    "multiple_choice": [Choices(text, "Who was it?", ("a dog", "the hill and the cat"), 1) for text in TEXTS],
    "text_to_text": [Pair(text, "far away") for text in TEXTS],
    "chat": [Conversation((Message("user", text), Message("assistant", "far away"))) for text in TEXTS[:2]],
}
FIGURES = {
    "step": 7,
    "epoch": 2,
    "examples": {"train": 900, "validation": 1234},
    "figures": {"validation": {"accuracy": {"value": 87.654, "low": 85.0, "high": 90.125}}},
    "perplexity": {"of": "stories.txt", "tokens": 4321, "before": 17.25, "after": 18.5},
}
LORA = {"rank": 2, "targets": ["query", "mlp_in", "out"]}
MakeFinetuned = Callable[..., Run]


class Exported(NamedTuple):
    """A fine-tuned run, and the folder of its export."""

    form: str
    run: Run
    folder: Path


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model runs no faster on more, and JAX has threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def make_finetuned(make_run) -> MakeFinetuned:
    """Makes a run with random weights that a form was fine-tuned into, low-rank updates and all."""

    def make(form: str, base: Run | None = None, tokens: tuple[str, ...] = (), **model: Any) -> Run:
        lora = model.get("lora", LORA if form in ("classification", "text_to_text") else None)
        recipe = {"name": "moods", "base": "runs/base", "seeds": [3], "task": TASKS[form], "model": {"lora": lora}}
        finetune = FinetuneConfig.model_validate_json(json.dumps(recipe))
        tokenizer = (base or make_run(num_layers=1)).tokenizer.with_special_tokens(tokens)
        tokenizer = tokenizer.with_special_tokens(special_tokens(finetune.task))
        settings = {
            "num_layers": 1,
            "context_length": 100,
            "vocab_size": tokenizer.vocab_size,
            "special_tokens": len(tokenizer.special_tokens),
            "num_classes": CLASSES.get(form),
        }
        run = make_run(**(settings | model | {"lora": finetune.model.lora}))
        config = run.config.model_copy(update={"finetune": finetune, "seed": 3})
        template = chat_template(tokenizer) if form == "chat" else None
        return dataclasses.replace(run, config=config, tokenizer=tokenizer, chat_template=template)

    return make


@pytest.fixture(scope="module")
def exports(make_finetuned, tmp_path_factory) -> dict[str, Exported]:
    """Every form, exported."""
    found = {}
    for form in TASKS:
        run, folder = make_finetuned(form), tmp_path_factory.mktemp(form) / "model"
        assert export_huggingface(run, folder, FIGURES, 10**9) == ["model.safetensors"]
        found[form] = Exported(form, run, folder)
    return found


@pytest.fixture
def silence() -> Iterator[None]:
    """The public library has nothing to warn of."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
    assert told == []


def public_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def load(exported: Exported) -> tuple[Any, Any]:
    """The model, by the most automatic class that there is, and its tokenizer; every tensor must be one of its own."""
    automatic = transformers.AutoModelForSequenceClassification
    if exported.form == "multiple_choice":
        automatic = transformers.OpenAIGPTDoubleHeadsModel
    elif exported.form not in CLASSES:
        automatic = transformers.AutoModelForCausalLM
    model, told = automatic.from_pretrained(exported.folder, output_loading_info=True)
    assert not any(told.values()), told
    assert [type(model).__name__] == json.loads((exported.folder / "config.json").read_text())["architectures"]
    return model.eval(), public_tokenizer(exported.folder)


def dataset_of(exported: Exported) -> Dataset:
    run = exported.run
    assert run.config.finetune is not None
    return Dataset(encode(run.config.finetune.task, EXAMPLES[exported.form], run.tokenizer, run.config.context_length))


def whole_batch(dataset: Dataset) -> Batch:
    return dataset.batch(range(len(dataset)), int(dataset.lengths_N.max()), len(dataset))


def our_scores(exported: Exported) -> np.ndarray:
    found = jax.jit(partial(task_scores, exported.run.config))(exported.run.params, whole_batch(dataset_of(exported)))
    scores = np.asarray(found)
    assert scores.std() > 0.1
    return scores


def our_logits(run: Run, tokens_BT: np.ndarray) -> np.ndarray:
    def forward(params: Any, tokens_BT: jax.Array) -> jax.Array:
        model = bind(run.config.model, params)
        return model.logits(model(tokens_BT)[0])

    return np.asarray(jax.jit(forward)(run.params, tokens_BT.astype(np.int32)))


def rows_of(inputs: Any) -> list[list[int]]:
    """The tokens of each row without its padding."""
    return [ids[mask == 1].tolist() for ids, mask in zip(inputs.input_ids, inputs.attention_mask, strict=True)]


def check_same_tokens(inputs: Any, exported: Exported, nth: int = 0) -> None:
    dataset = dataset_of(exported)
    expected = [dataset.sequences(number)[nth].tolist() for number in range(len(dataset))]
    assert rows_of(inputs) == expected
    assert len({len(row) for row in expected}) > 1  # there is padding


@torch.no_grad()
def pair_scores(exported: Exported, order: int = 1) -> np.ndarray:
    """Of the examples of a form with one or two texts, in one padded batch."""
    model, tokenizer = load(exported)
    texts = zip(*(example.texts[::order] for example in EXAMPLES[exported.form]), strict=True)
    inputs = tokenizer(*map(list, texts), padding=True, return_tensors="pt")
    check_same_tokens(inputs, exported, nth=0 if order == 1 else 1)
    return model(**inputs).logits.numpy()


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("form", ["classification", "entailment"])
def test_the_scores_of_classes(exports, form):
    np.testing.assert_allclose(pair_scores(exports[form]), our_scores(exports[form]), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("silence")
def test_the_scores_of_both_orders_add_up(exports):
    exported = exports["similarity"]
    theirs = pair_scores(exported) + pair_scores(exported, order=-1)
    np.testing.assert_allclose(theirs, our_scores(exported), rtol=0, atol=1e-5)


@pytest.mark.usefixtures("silence")
@torch.no_grad()
def test_the_scores_of_answers_and_of_tokens(exports):
    exported = exports["multiple_choice"]
    model, tokenizer = load(exported)
    examples: list[Choices] = EXAMPLES["multiple_choice"]
    pairs = [(f"{one.context} {one.question}", answer) for one in examples for answer in one.answers]
    inputs = tokenizer(*map(list, zip(*pairs, strict=True)), padding=True, return_tensors="pt")
    dataset = dataset_of(exported)
    assert rows_of(inputs) == [row.tolist() for number in range(3) for row in dataset.sequences(number)]
    tokens = inputs.input_ids.reshape(3, 2, -1)
    last = inputs.attention_mask.sum(-1).reshape(3, 2) - 1
    found = model(tokens, mc_token_ids=last)
    np.testing.assert_allclose(found.mc_logits.numpy(), our_scores(exported), rtol=0, atol=1e-5)
    ours = our_logits(exported.run, inputs.input_ids.numpy())
    np.testing.assert_allclose(found.logits.reshape(ours.shape).numpy(), ours, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("form", ["text_to_text", "chat"])
@torch.no_grad()
def test_the_scores_of_tokens(exports, form):
    exported = exports[form]
    model, tokenizer = load(exported)
    if form == "chat":
        conversations = [[turn._asdict() for turn in example.messages] for example in EXAMPLES[form]]
        inputs = tokenizer.apply_chat_template(conversations[0], return_dict=True, return_tensors="pt")
        assert inputs.input_ids[0].tolist() == dataset_of(exported).sequences(0)[0].tolist()
        asked = tokenizer.apply_chat_template(conversations[0][:1], add_generation_prompt=True, return_dict=True)
        prompt = encode_prompt(exported.run.tokenizer, EXAMPLES[form][0].messages[:1], 92).tokens
        assert asked["input_ids"] == prompt.tolist()
        assert model.generation_config.eos_token_id == exported.run.tokenizer.special_id("<|end|>")
    else:
        tokenizer.pad_token = tokenizer.eos_token
        sources, targets = zip(*EXAMPLES[form], strict=True)
        inputs = tokenizer(list(sources), list(targets), padding=True, return_tensors="pt")
        check_same_tokens(inputs, exported)
        (prompt,) = tokenizer([sources[0]]).input_ids
        whole = dataset_of(exported).sequences(0)[0].tolist()
        assert whole[: len(prompt)] == prompt and whole[len(prompt) - 1] == tokenizer.convert_tokens_to_ids(
            "_delimiter_"
        )
        assert model.generation_config.eos_token_id == exported.run.tokenizer.separator_id
    theirs = model(**inputs).logits.numpy()
    ours = our_logits(exported.run, inputs.input_ids.numpy())
    seen = inputs.attention_mask.numpy() == 1
    np.testing.assert_allclose(theirs[seen], ours[seen], rtol=0, atol=1e-5)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("form", TASKS)
def test_the_card_s_own_code_runs(exports, form, monkeypatch, capsys):
    monkeypatch.chdir(exports[form].folder)
    card = Path("README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    if form == "multiple_choice":
        assert printed.strip() in ("An answer.", "Another answer, a longer one.")
    elif form in ("classification", "entailment"):
        assert set(json.loads(printed.replace("'", '"'))) <= {"happy", "sad", "angry"}
    elif form == "similarity":
        assert len(json.loads(printed)) == 2
    assert "add up" in card if form == "similarity" else "add up" not in card


def test_a_pipeline_needs_to_know_nothing_of_the_form(exports):
    exported = exports["classification"]
    ask = transformers.pipeline("text-classification", model=str(exported.folder))
    found = [answer["label"] for answer in ask(list(TEXTS))]
    assert found == [("happy", "sad", "angry")[number] for number in our_scores(exported).argmax(-1)]


def test_the_configuration_says_what_the_head_is(exports):
    found = {form: json.loads((exports[form].folder / "config.json").read_text()) for form in TASKS}
    assert found["entailment"]["label2id"] == {"happy": 0, "sad": 1, "angry": 2}
    assert found["entailment"]["problem_type"] == "single_label_classification"
    assert (found["similarity"]["problem_type"], found["similarity"]["num_labels"]) == ("regression", 1)
    assert "num_labels" not in found["chat"] and "pad_token_id" not in found["text_to_text"]
    generates = {form for form in TASKS if (exports[form].folder / "generation_config.json").exists()}
    assert generates == {"text_to_text", "chat"}


def test_the_card_says_what_is_known(exports, make_finetuned, tmp_path):
    card = (exports["classification"].folder / "README.md").read_text()
    for told in (
        "`moods` (classification)",
        "`_start_ text _classify_`",
        "| base | `runs/base` |",
        "| corpus of the base | fingerprint `ffffffffffffffff`",
        "| labels | `happy`, `sad`, `angry` |",
        "| seed | 3 |",
        "| epochs | 3; epoch 2 was chosen |",
        "| low-rank updates | rank 2, alpha 16, of query, mlp_in, out; merged into the weights |",
        "| validation | 1,234 | accuracy | 87.65 | 85.00 to 90.12 |",
        "17.25 before fine-tuning, 18.50 after it",
    ):
        assert told in card, told
    run = dataclasses.replace(make_finetuned("chat"), corpus=None)
    export_huggingface(run, tmp_path / "out", FIGURES | {"step": 6}, 10**9)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| corpus of the base | not known: the weights were imported |" in card
    assert "None were recorded for these weights" in card
    assert "low-rank" not in card and "was chosen" not in card


@pytest.mark.parametrize("form", ["text_to_text", "chat"])
def test_what_makes_texts_comes_back_bit_by_bit(exports, form, tmp_path):
    exported, told = exports[form], []
    import_run(exported.folder, tmp_path / "run", ["model.dtype=float32"], told.append)
    found, expected = open_run(tmp_path / "run"), merged_run(exported.run)
    jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)
    assert found.tokenizer.to_bytes() == exported.run.tokenizer.to_bytes()
    assert found.config.model.special_tokens == {"text_to_text": 2, "chat": 4}[form]
    assert told == []
    export_huggingface(found, tmp_path / "again", {}, 10**9)
    again = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text())
    assert again.get("chat_template") == found.chat_template == exported.run.chat_template
    assert (found.chat_template is not None) == (form == "chat")


@pytest.mark.parametrize("moved", [False, True])
def test_a_chat_template_of_another_form_is_left_out_and_told_of(exports, tmp_path, moved):
    folder, told = shutil.copytree(exports["chat"].folder, tmp_path / "model"), []
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    other = settings.pop("chat_template").replace("<|end|>", "<|eot|>")
    if moved:  # where later versions of transformers write it
        (folder / "chat_template.jinja").write_text(other)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings if moved else settings | {"chat_template": other})
    )
    import_run(folder, tmp_path / "run", [], told.append)
    assert len(told) == 1 and "its chat template is left out: conversations have another form here" in told[0]
    assert open_run(tmp_path / "run").chat_template is None


@pytest.mark.parametrize("form", ["entailment", "multiple_choice"])
def test_a_classifier_is_left_out_and_told_of(exports, form, tmp_path):
    exported, told = exports[form], []
    import_run(exported.folder, tmp_path / "run", ["model.dtype=float32"], told.append)
    found, expected = open_run(tmp_path / "run"), merged_run(exported.run)
    for part in ("embedding", "blocks"):
        jax.tree.map(np.testing.assert_array_equal, found.params[part], expected.params[part])
    assert (found.config.model.num_classes, found.config.model.special_tokens) == (None, 3)
    assert len(told) == 1 and "its classifier" in told[0] and "is left out" in told[0]


def test_what_the_public_library_stores_again_is_taken(exports, tmp_path):
    """The class of two heads stores the output projection in the place of the token embedding."""
    exported = exports["multiple_choice"]
    shutil.copytree(exported.folder, tmp_path / "model")
    transformers.OpenAIGPTDoubleHeadsModel.from_pretrained(exported.folder).save_pretrained(tmp_path / "model")
    import_run(tmp_path / "model", tmp_path / "run", ["model.dtype=float32"])
    found = open_run(tmp_path / "run").params["embedding"]["token_kernel"]
    np.testing.assert_array_equal(found, exported.run.params["embedding"]["token_kernel"])


@pytest.mark.parametrize("override", ["model.lora={}", "model.num_classes=3", "model.special_tokens=1"])
def test_an_import_gets_no_head_by_an_override(exports, override, tmp_path):
    with pytest.raises(UserError, match=override.split("=")[0]):
        import_run(exports["chat"].folder, tmp_path / "run", [override])
    assert list(tmp_path.iterdir()) == []


def test_the_form_of_the_inputs_stays_with_the_task(make_run, make_finetuned, tmp_path):
    """A tokenizer of the public library gets it in the export alone, and comes back without it."""
    base = make_run(num_layers=1)
    base = dataclasses.replace(base, tokenizer=FastTokenizer(fast_tokenizer_json(base.tokenizer)))
    run = make_finetuned("classification", base)
    export_huggingface(run, tmp_path / "model", {}, 10**9)
    public = public_tokenizer(tmp_path / "model")
    assert public("The cat").input_ids[0] == run.tokenizer.special_id("_start_")
    import_run(tmp_path / "model", tmp_path / "run", ["model.dtype=float32"])
    found = open_run(tmp_path / "run")
    assert found.tokenizer.fingerprint == run.tokenizer.fingerprint
    export_huggingface(found, tmp_path / "again", {}, 10**9)
    public = public_tokenizer(tmp_path / "again")
    assert public("The cat").input_ids == run.tokenizer.encode("The cat").tolist()


def test_a_classifier_that_once_conversed_reads_no_token_in_a_text(make_finetuned, tmp_path):
    run = make_finetuned("classification", tokens=CHAT_TOKENS)
    export_huggingface(run, tmp_path / "model", {}, 10**9)
    public = public_tokenizer(tmp_path / "model")
    assert public.chat_template is None
    text = "a <|end|> _classify_"
    assert public(text, add_special_tokens=False).input_ids == run.tokenizer.encode(text).tolist()


def test_another_architecture_is_refused_with_its_updates(make_finetuned, tmp_path):
    run = make_finetuned("classification", bias=False)
    with pytest.raises(UserError, match=r"this run has model\.bias=false; export it with --format stablehlo"):
        export_huggingface(run, tmp_path / "out", {}, 10**9)


def test_the_classifier_is_a_function_of_its_own(exports, tmp_path, monkeypatch, capsys):
    exported = exports["classification"]
    assert export_stablehlo(exported.run, tmp_path / "hlo") == ["forward", "decode", "classify"]
    monkeypatch.chdir(tmp_path / "hlo")
    manifest = json.loads(Path("manifest.json").read_text())
    assert manifest["labels"] == ["happy", "sad", "angry"]
    assert manifest["special_tokens"] == {"_start_": 320, "_delimiter_": 321, "_classify_": 322}
    assert manifest["functions"]["classify"]["results"] == {"scores": {"shape": ["b", 3], "dtype": "float32"}}
    assert not any("lora" in name for name in manifest["weights"])
    (code,) = re.findall(r"```python\n(.*?)```", Path("README.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.endswith("(2, 3)\n")
    batch = whole_batch(dataset_of(exported))
    found = names["classify"](names["weights"], batch.tokens_BKT[:, 0], batch.last_BK[:, 0])
    np.testing.assert_allclose(found, our_scores(exported), rtol=0, atol=1e-5)


def test_the_command_puts_the_results_on_the_card(make_finetuned, write_run, gpt1, tmp_path):
    run = make_finetuned("classification")
    config = run.config.model_copy(update={"name": "run", "runs_dir": str(tmp_path)})
    write_run(dataclasses.replace(run, config=config, path=tmp_path / "run"))
    (tmp_path / "run" / "results.json").write_text(json.dumps(FIGURES | {"step": 0}))
    code, _, err = gpt1("export", tmp_path / "run", tmp_path / "model")
    assert (code, err) == (0, "")
    assert "| validation | 1,234 | accuracy | 87.65 |" in (tmp_path / "model" / "README.md").read_text()
    code, out, err = gpt1("import", tmp_path / "model", tmp_path / "again")
    assert code == 0 and "again is imported" in out
    assert err == (
        f"{tmp_path / 'model'}: its classifier (score.weight) is left out: a run gets one by 'gpt1 finetune'; the "
        "transformer below it is imported\n"
    )
    (tmp_path / "run" / "results.json").write_text("[")
    code, _, err = gpt1("export", tmp_path / "run", tmp_path / "other")
    assert code == 3 and "results.json: not what fine-tuning writes" in err
