import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import hypothesis
import hypothesis.strategies as st
import pydantic
import pytest

from gpt1_jax.config import Config, FinetuneConfig, Recipe
from gpt1_jax.config_file import load_config, parse, parse_config
from gpt1_jax.errors import UserError

CONFIGS = sorted(Path("configs").glob("*.yaml"))


def problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        parse_config(text, "c.yaml", overrides)
    return str(error.value).splitlines()


def test_defaults_are_the_papers():
    config = Config()
    model, optimizer = config.model, config.optimizer
    assert (model.num_layers, model.embed_dim, model.num_heads, model.mlp_dim) == (12, 768, 12, 3072)
    assert (model.context_length, model.vocab_size, model.head_dim) == (512, 40478, 64)
    assert (model.dropout, model.attention_dropout) == (0.1, 0.1)
    assert (optimizer.learning_rate, optimizer.warmup_steps, optimizer.weight_decay) == (2.5e-4, 2000, 0.01)
    assert (optimizer.beta1, optimizer.beta2, optimizer.epsilon, optimizer.clip_norm) == (0.9, 0.999, 1e-8, 1.0)
    assert config.train.batch_size == 64


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_loads_names_itself_and_says_how_to_run_it(path: Path):
    config = load_config(path)
    assert config.name == path.stem
    assert path.read_text().startswith("#")
    assert f"gpt1 train {path}" in path.read_text()


def test_shipped_gpt1_differs_from_the_defaults_in_its_corpus_alone():
    config = load_config("configs/gpt1.yaml")
    assert config.model_copy(update={"data": Config().data}) == Config()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_resolved_config_loads_again(path: Path):
    config = load_config(path, ["train.steps=777_777"])
    assert parse_config(config.to_yaml(), "resolved") == config


def test_it_is_frozen():
    with pytest.raises(pydantic.ValidationError):
        Config().seed = 3


def test_all_errors_come_in_one_message_with_place_value_and_nearest_key():
    text = "train:\n  stepz: 3\n  batch_size: 0\nmodell: {}\noptimizer:\n  beta1: fast\nembed_dim: 3\n"
    assert sorted(problems(text, "train.log_every=no")) == [
        "c.yaml:2: train.stepz=3: unknown key; did you mean 'train.steps'?",
        "c.yaml:3: train.batch_size=0: input should be greater than 0",
        "c.yaml:4: modell={}: unknown key; did you mean 'model'?",
        'c.yaml:6: optimizer.beta1="fast": input should be a valid number',
        "c.yaml:7: embed_dim=3: unknown key; did you mean 'model.embed_dim'?",
        'command line: train.log_every="no": input should be a valid integer',
    ]
    assert problems("batch_size: 3") == ["c.yaml:1: batch_size=3: unknown key; did you mean 'train.batch_size'?"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("model: {num_heads: 7}", ["model.num_heads=7", "model.embed_dim=768"]),
        ("train: {context_length: 513}", ["train.context_length=513", "model.context_length=512"]),
        ("train: {steps: 10}", ["optimizer.warmup_steps=2000", "train.steps=10"]),
        ("train: {steps: 0}", ["train.steps=0"]),
        ("train: {batch_size: 64, accumulation: 3}", ["train.accumulation=3", "train.batch_size=64"]),
        ("mesh: {data: null, fsdp: null}", ["mesh.data", "mesh.fsdp"]),
        ("evaluation: {stride: 600}", ["evaluation.stride=600", "model.context_length=512"]),
        (
            "{train: {context_length: 200}, evaluation: {stride: 201}}",
            ["evaluation.stride=201", "train.context_length=200"],
        ),
        (
            "{train: {context_length: 128}}",
            ["evaluation.sample_tokens=128", "train.context_length=128"],
        ),
        ("evaluation: {prompts: []}", ["evaluation.prompts=[]"]),
        ("evaluation: {sample_tokens: 512}", ["evaluation.sample_tokens=512", "model.context_length=512"]),
        ("data: {cleaning: {min_chars: 9, max_chars: 3}}", ["min_chars=9", "max_chars=3"]),
        ("name: a/b", ['name="a/b"']),
        ("seed: -1", ["seed=-1"]),
        ("optimizer: {learning_rate: .inf}", ["learning_rate"]),
    ],
)
def test_what_contradicts_itself_is_refused(text: str, expected: list[str]):
    (line,) = problems(text)
    assert line.startswith("c.yaml:1: ")
    for part in expected:
        assert part in line


SCHEDULE = "data:\n  sources:\n    - kind: python_docs\n    - kind: stories\n      weight: "


@pytest.mark.parametrize(
    ("text", "weight"),
    [("3", 3.0), ("{0: 1, 20_000: 0.25}", {0: 1.0, 20_000: 0.25}), ("{'0': 0, '7': 2}", {0: 0.0, 7: 2.0})],
)
def test_a_weight_is_a_number_or_a_schedule_and_reads_back(text: str, weight: object):
    config = parse_config(SCHEDULE + text, "c")
    assert config.data.sources[1].weight == weight
    assert parse_config(config.to_yaml(), "again") == config
    assert Config.model_validate_json(config.model_dump_json()) == config
    assert parse_config("", "c", [f"data.sources=[{{kind: stories, weight: {text}}}, {{kind: python_docs}}]"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{5: 1}", 'data.sources.1.weight={"5": 1.0}: a schedule begins at step 0; add a weight for it'),
        ("{}", "data.sources.1.weight={}: a schedule begins at step 0; add a weight for it"),
        ("{0: -1}", "data.sources.1.weight.0=-1: input should be greater than or equal to 0"),
        ("{0: 1, -3: 1}", 'data.sources.1.weight.-3="-3": the keys of a schedule are steps, whole numbers from 0'),
        ("{0: 1, '07': 1}", 'data.sources.1.weight.07="07": the keys of a schedule are steps, whole numbers from 0'),
        (
            "{0: 1, late: 1}",
            'data.sources.1.weight.late="late": the keys of a schedule are steps, whole numbers from 0',
        ),
        ("{0: 1, '0': 2}", "data.sources.1.weight.0: given twice; keep one of them"),
        ("0", "data.sources.1.weight=0: input should be greater than 0"),
        ("often", 'data.sources.1.weight="often": input should be a valid number'),
    ],
)
def test_a_schedule_that_is_none_is_refused(text: str, expected: str):
    assert problems(SCHEDULE + text) == [f"c.yaml:5: {expected}"]


def test_a_phase_in_which_nothing_is_drawn_is_refused():
    text = SCHEDULE.replace("python_docs\n", "python_docs\n      weight: {0: 1, 10: 0}\n") + "{0: 0, 5: 1, 20: 0}"
    (line,) = problems(text)
    assert "data.sources.0.weight=" in line and "from step 20 on every source has weight 0" in line


def test_a_source_is_checked_by_its_kind():
    text = "data:\n  sources:\n    - kind: files\n      path: [a]\n    - kind: filse\n"
    lines = problems(text)
    assert any("c.yaml:4: data.sources.0.path=" in line and "data.sources.0.paths" in line for line in lines)
    assert any(line.startswith("c.yaml:3: data.sources.0.paths: required") for line in lines)
    assert any("c.yaml:5" in line and "filse" in line for line in lines)


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("3E-4", 3e-4), ("1", 1.0), (".5", 0.5), ("1_0.0", 10.0), ("+1.5e+1", 15.0)],
)
def test_numbers_that_yaml_1_1_reads_as_words(text: str, value: float):
    assert parse_config(f"optimizer: {{learning_rate: {text}}}", "c").optimizer.learning_rate == value


@pytest.mark.parametrize("text", ["yes", "on", "1", "'true'", "True"])
def test_only_true_and_false_are_booleans(text: str):
    (line,) = problems(f"logging: {{tensorboard: {text}}}")
    assert "logging.tensorboard" in line


def test_true_is_no_number():
    (line,) = problems("train: {batch_size: true}")
    assert "train.batch_size=true" in line


def test_duplicate_keys_are_refused():
    assert problems("seed: 1\nseed: 2\n") == ["c.yaml:2: seed: given twice; keep one of them"]


def test_yaml_mistakes_name_the_line():
    (line,) = problems("model:\n  num_layers: [1\n")
    assert line.startswith("c.yaml:3: not valid YAML")


def test_tags_that_would_run_code_are_refused():
    assert "c.yaml:1: name: the tag" in problems("name: !!python/object/apply:os.system ['true']\n")[0]


def test_aliases_are_refused():
    assert "aliases are not supported" in problems("model: &a {num_layers: 3}\ntrain: *a\n")[0]


def test_overrides_win_and_the_last_one_most():
    config = parse_config("train: {batch_size: 4}", "c", ["train.batch_size=8", "train.batch_size=16", "name=x"])
    assert (config.train.batch_size, config.name) == (16, "x")


def test_overrides_take_lists():
    sources = parse_config("", "c", ["data.sources=[{kind: files, paths: [a, b]}]"]).data.sources
    assert sources[0].paths == ("a", "b")


@pytest.mark.parametrize("override", ["train.batch_size", "=3", "name.x=3"])
def test_malformed_overrides_are_named(override: str):
    (line,) = problems("", override)
    assert line.startswith("command line: ")


def test_a_missing_file_names_the_nearest(tmp_path: Path):
    (tmp_path / "tiny.yaml").touch()
    with pytest.raises(UserError, match=r"tny\.yaml.*did you mean 'tiny\.yaml'"):
        load_config(tmp_path / "tny.yaml")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


@hypothesis.given(
    st.dictionaries(st.sampled_from([*Config.model_fields, "x"]), json_values, max_size=4),
    st.lists(st.text(max_size=20), max_size=2),
)
@hypothesis.settings(deadline=None, max_examples=300)
def test_whatever_is_given_is_loaded_or_refused_as_the_users_mistake(values: dict, overrides: list[str]):
    try:
        config = parse_config(json.dumps(values), "c", overrides)
    except UserError as error:
        assert str(error)
    else:
        assert parse_config(config.to_yaml(), "again") == config


# Words that YAML of one version or the other would read as something else; and any other text.
TEXT = st.sampled_from(
    "no on null ~ true 1 08 0x1f 1e5 1.5e3 -2E+4 .5 .5e1 1_0 1:30 2026-11-22 = << - : # a:b {} [] ' \" ! & *".split(" ")
) | st.text(st.characters(max_codepoint=0xFFFF, exclude_categories=["Cs"]), max_size=6)
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,5}", fullmatch=True) | st.sampled_from(
    ["1e5", "12E3", "0", "no", "1.5e3", "2026-11-22"]
)


def values_of(annotation: Any) -> st.SearchStrategy:
    """Values of a key, most of them valid."""
    arguments = get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        fields = annotation.model_fields.items()
        needed, optional = ({k: f for k, f in fields if f.is_required() == required} for required in (True, False))
        return st.fixed_dictionaries(
            {key: values_of(field.annotation) for key, field in needed.items()},
            optional={key: values_of(field.annotation) for key, field in optional.items()},
        )
    if annotation in SIMPLE:
        return SIMPLE[annotation]
    origin = get_origin(annotation)
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is Annotated:
        return values_of(arguments[0])
    if origin is tuple:
        return st.lists(values_of(arguments[0]), min_size=1, max_size=3)
    if origin is dict:  # a schedule
        return st.dictionaries(st.integers(1, 999).map(str), SIMPLE[float], max_size=2).map(lambda d: {"0": 1.0, **d})
    return st.one_of(map(values_of, arguments))


SIMPLE: dict[Any, st.SearchStrategy] = {
    bool: st.booleans(),
    int: st.integers(2, 4096),
    float: st.floats(0, 1, exclude_min=True, exclude_max=True),
    str: TEXT,
    type(None): st.none(),
}


def keys_of(section: type[pydantic.BaseModel], prefix: str = "") -> Iterator[tuple[str, st.SearchStrategy]]:
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, pydantic.BaseModel):
            yield from keys_of(field.annotation, f"{prefix}{name}.")
        elif name != "finetune":
            yield prefix + name, NAMES if name == "name" else values_of(field.annotation)


KEYS = dict(keys_of(Config))
CHOSEN = st.lists(st.sampled_from(sorted(KEYS)), min_size=1, max_size=4, unique=True).flatmap(
    lambda keys: st.fixed_dictionaries({key: KEYS[key] for key in keys})
)


@hypothesis.given(chosen=CHOSEN)
@hypothesis.settings(deadline=None, max_examples=150)
def test_any_configuration_reads_back_and_an_override_is_as_a_line_of_the_file(chosen: dict[str, Any]):
    overrides = [f"{key}={json.dumps(value)}" for key, value in chosen.items()]
    nested: dict[str, Any] = {}
    for key, value in chosen.items():
        *sections, last = key.split(".")
        section = nested
        for name in sections:
            section = section.setdefault(name, {})
        section[last] = value
    try:
        config = parse_config(json.dumps(nested), "c")
    except UserError:
        with pytest.raises(UserError):
            parse_config("", "c", overrides)
        hypothesis.reject()  # and so that most are not of this kind
    else:
        assert parse_config("", "c", overrides) == config
        assert parse_config(config.to_yaml(), "again") == config


@pytest.mark.parametrize("name", ["1e5", "1.5e3", "12E3"])
def test_a_name_like_a_number_stays_a_name(name: str):
    config = parse_config(f"name: '{name}'", "c")
    assert parse_config(config.to_yaml(), "again").name == name


def kinds(annotation: object) -> list[type[pydantic.BaseModel]]:
    """The sections that a key may hold: it may be null, a list, or one of several."""
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [kind for inner in get_args(annotation) for kind in kinds(inner)]


def sections(section: type[pydantic.BaseModel], name: str = "config") -> Iterator[tuple[str, type[pydantic.BaseModel]]]:
    """Every section by the name of the key that holds it."""
    yield name, section
    for key, field in section.model_fields.items():
        for kind in kinds(field.annotation):
            yield from sections(kind, key)


def test_every_key_is_read_somewhere():
    """A key is read as ``SECTION.KEY``, or, in a file that names the section's class, as the ``KEY`` of anything."""
    every = {
        (name, key, section.__name__)
        for name, section in sections(Config)
        for key, field in section.model_fields.items()
        if not kinds(field.annotation)
    }
    read = set()
    for path in Path("gpt1_jax").rglob("*.py"):
        if path.name.endswith("config.py"):
            continue
        code = path.read_text(encoding="utf-8")
        attributes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Attribute)]
        keys = {node.attr for node in attributes}
        read |= {(name, key) for name, key, kind in every if key in keys and kind in code}
        chains = {ast.unparse(node).replace("_config", "config") for node in attributes}
        read |= {(chain.split(".")[-2].lstrip("_"), chain.split(".")[-1]) for chain in chains}
    by_other_names = {
        ("mesh", "fsdp"),  # with the other axes, as the sizes of the mesh
        ("mesh", "tensor"),
        ("model", "loss_chunk"),  # as the positions that it stands for
        ("optimizer", "warmup_fraction"),
        ("task", "form"),  # as the class that it chooses
        ("zero_shot", "by"),
    }
    assert {(name, key) for name, key, _ in every} - read <= by_other_names


@pytest.fixture
def recipes(tmp_path):
    """A folder with a recipe of one source, one of a schedule, and one of both."""
    (tmp_path / "tales.yaml").write_text("data:\n  sources:\n    - {kind: stories, documents: 5, weight: 2}\n")
    (tmp_path / "late.yaml").write_text("data:\n  sources:\n    - {kind: python_docs, weight: {0: 0, 10: 3}}\n")
    (tmp_path / "both.yaml").write_text(
        f"data:\n  sources:\n    - {{kind: recipe, file: {tmp_path}/tales.yaml, weight: 0.5}}\n"
        f"    - {{kind: recipe, file: {tmp_path}/late.yaml, weight: {{0: 1, 20: 0.5}}}}\n"
    )
    return tmp_path


def test_recipe_is_its_sources(recipes):
    config = parse_config(
        f"data:\n  sources:\n    - {{kind: recipe, file: {recipes}/both.yaml, weight: 4}}\n", "c.yaml"
    )
    first, second = config.data.sources
    assert (first.kind, first.documents, first.weight) == ("stories", 5, 4.0)
    assert (second.kind, second.weight) == ("python_docs", {0: 0.0, 10: 12.0, 20: 6.0})
    assert parse_config(config.to_yaml(), "c.yaml") == config
    assert parse_config("", "c", [f"data.sources=[{{kind: recipe, file: {recipes}/tales.yaml}}]"]).data.sources == (
        first.model_copy(update={"weight": 2.0}),
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("data: {sources: [{kind: stories, dokuments: 1}]}", r"/r.yaml:1: data.sources.1.dokuments=1: unknown key"),
        ("data: {sources: [{kind: stories}], workers: 2}", r"c.yaml:4: .* and no other key"),
        ("name: x", r"c.yaml:4: .* holds the list data.sources, and no other key"),
        ("data: {sources: [{kind: recipe, file: FILE}]}", "the recipe is part of itself"),
        ("data: {sources: [{kind: recipe, file: nowhere/x.yaml}]}", r"r.yaml:1: .*x.yaml: there is no such recipe"),
        ("data: {sources: [{kind: recipe}]}", "file=null: a recipe is a YAML file"),
        ("data: {sources: [{kind: recipe, file: FILE, weigth: 1}]}", "weigth: unknown key .* did you mean 'weight'"),
        ("data: {sources: [{kind: stories, weight: -1}]}", r"/r.yaml:1: data.sources.1.weight=-2.0: input should be"),
        ("data: [", "not valid YAML"),
        ("data: {sources: [{kind: stories, weight: {first: 1}}]}", "the keys of a schedule are steps"),
    ],
)
def test_mistakes_in_recipes_are_located(tmp_path, content, message):
    file = tmp_path / "r.yaml"
    file.write_text(content.replace("FILE", str(file)))
    text = f"data:\n  sources:\n    - kind: stories\n    - {{kind: recipe, file: {file}, weight: 2.0}}\n"
    with pytest.raises(UserError, match=message):
        parse_config(text, "c.yaml")


TASK = """
task:
  form: similarity
  first: chat
  second: b
  label: l
  metrics: [pearson]
  validation: {kind: files, paths: [x]}
""".lstrip()


def task_problems(text: str, *overrides: str) -> list[str]:
    with pytest.raises(UserError) as error:
        parse(FinetuneConfig, text, "t.yaml", overrides)
    return str(error.value).splitlines()


FORMS = "classification, entailment, similarity, multiple_choice, text_to_text, chat"
METRICS = "accuracy, f1, matthews, pearson, spearman, exact_match, bleu, chrf, rouge1, rouge2, rougeL"


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("second: b", "second: b\n  secnd: c", "t.yaml:5: task.secnd=\"c\": unknown key; did you mean 'task.second'?"),
        (
            "similarity",
            "similarty",
            f"t.yaml:2: task.form=\"similarty\": choose from {FORMS}; did you mean 'similarity'?",
        ),
        ("similarity", "last_word", f't.yaml:2: task.form="last_word": choose from {FORMS}'),
        ("  form: similarity\n", "", "t.yaml:1: task.form: required, but not given"),
        (
            "[pearson]",
            "[pearsn]",
            f"t.yaml:6: task.metrics.0=\"pearsn\": choose from {METRICS}; did you mean 'pearson'?",
        ),
        ("[pearson]", "[f1]", "t.yaml:6: task.metrics=f1: not a metric of numbers; choose from pearson, spearman"),
        ("second: b", "second: 5", "t.yaml:4: task.second=5: input should be a valid string"),
        ("second: b", "second: [b, 5]", "t.yaml:4: task.second.1=5: input should be a valid string"),
        (
            "kind: files",
            "kind: file",
            't.yaml:7: task.validation.kind="file": choose from files, tfds, huggingface, toy_language, toy_dialogue; '
            "did you mean 'files'?",
        ),
        (
            "[x]}",
            "[x], heder: true}",
            "t.yaml:7: task.validation.heder=true: unknown key; did you mean 'task.validation.header'?",
        ),
        ("  label: l\n", "", "t.yaml:1: task.label: required, but not given"),
    ],
)
def test_mistakes_in_a_task_name_the_key_and_what_is_nearest(old: str, new: str, expected: str):
    assert task_problems(TASK.replace(old, new)) == [expected]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.accumulation=3", "train.accumulation=3 does not divide train.batch_size=32"),
        ("model.attention=splash", "model.attention=splash cannot drop attention probabilities"),
        ("model.lora={rnk: 3}", "model.lora.rnk=3: unknown key; did you mean 'model.lora.rank'?"),
        ("model.lora={targets: [qery]}", 'model.lora.targets.0="qery": choose from query, key,'),
        ("model.lora={targets: []}", "model.lora.targets=[]"),
        ("seeds=[1, 1]", "seeds=[1, 1]: give every seed once"),
        ("seeds=[]", "seeds=[]"),
        ("train.axiliary=1", "train.axiliary=1: unknown key; did you mean 'train.auxiliary'?"),
        ("optimizer.layer_decay=0", "optimizer.layer_decay=0: input should be greater than 0"),
        ("task.test={kind: tfds, dataset: d}", "task.test.split: required, but not given"),
    ],
)
def test_mistakes_in_fine_tuning_are_one_line(override: str, expected: str):
    (line,) = task_problems(TASK, override)
    assert line.startswith("command line: ") and expected in line


def test_zero_shot_of_two_kinds_is_told_apart():
    task = TASK.replace("similarity", "classification").replace("first: chat\n  second: b", "text: t\n  labels: [a, b]")
    task = task.replace("pearson", "f1")
    assert (
        parse(Recipe, task, "t.yaml", ["task.zero_shot={by: log_probability}"]).task.zero_shot.by == "log_probability"
    )
    zero_shot = "task.zero_shot={by: answers, prompt: '{text}', answers: [x, y], "
    assert task_problems(task, zero_shot + "promt: z}") == [
        "command line: task.zero_shot.promt=\"z\": unknown key; did you mean 'task.zero_shot.prompt'?"
    ]
    assert task_problems(task, "task.zero_shot={by: anwsers}") == [
        "command line: task.zero_shot.by=\"anwsers\": choose from answers, log_probability; did you mean 'answers'?"
    ]


def test_a_fine_tuned_runs_configuration_reads_back():
    config = parse(FinetuneConfig, TASK, "t.yaml", ["model.lora={rank: 4}", "seeds=[3, 1]", "task.first=[a, b]"])
    assert config.task.first == ("a", "b")
    whole = Config(finetune=config)
    assert parse_config(whole.to_yaml(), "again") == whole
