import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from gpt1_jax.config_file import parse_config
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.model.transformer import num_parameters
from gpt1_jax.reporting.report import write_report

CONFIG = """
name: {name}
model: {{vocab_size: 97, context_length: 16, num_layers: 2, embed_dim: 32, num_heads: 4, mlp_dim: 64}}
train: {{steps: 200, batch_size: {batch_size}}}
optimizer: {{warmup_steps: 10}}
evaluation: {{sample_tokens: 8}}
"""
EVIL = "<script src='https://example.com/x.js'>alert(1)</script> & \"more\""


def make_run(folder: Path, batch_size: int = 4, mfu: float | None = None, steps: int = 120) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        parse_config(CONFIG.format(name=folder.name, batch_size=batch_size), "test").to_yaml()
    )
    lines = []
    for step in range(1, steps + 1):
        loss = 2 + 3 * math.exp(-step / 30)
        tokens = step * 16 * batch_size
        lines.append(
            {
                "step": step,
                "loss": loss,
                "learning_rate": 1e-3,
                "grad_norm": 5 / step,
                "tokens": tokens,
                "seconds": 31.5 * step,
                "tokens_per_second": 1500.0,
                "mfu": mfu,
            }
        )
        if step % 40 == 0:
            lines.append(
                {
                    "step": step,
                    "tokens": tokens,
                    "validation_loss": loss,
                    "validation_perplexity": math.exp(loss),
                    "validation_bits_per_byte": loss / 2,
                }
            )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def add_results(folder: Path) -> None:
    samples = [{"step": 120, "prompt": "The", "completion": f" {number} {EVIL}"} for number in range(2)]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    figures = {
        "step": 120,
        "split": "validation",
        "perplexity": 8.125,
        "word_perplexity": None,
        "bits_per_byte": 1.234,
        "xz_bits_per_byte": 2.345,
    }
    (folder / "evaluation.json").write_text(json.dumps(figures))


class Page(HTMLParser):
    """The rows of the tables, the tags, and what they refer to."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.references, self.rows = [], [], []
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [value for name, value in attrs if name in ("src", "href", "srcset", "data", "action")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_data(self, data):
        if self.rows and self.rows[-1] and self.tags[-1] in ("td", "th"):
            self.rows[-1][-1] += data.strip()

    @property
    def table(self) -> dict[str, list[str]]:
        return {name: values for name, *values in self.rows}


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "full", mfu=0.25)
    add_results(folder)
    return Path(write_report([folder]))


def test_the_headline_holds_the_figures(full):
    table = Page(full).table
    model = parse_config(CONFIG.format(name="full", batch_size=4), "test").model.model_copy(update={"dtype": "float32"})
    assert table == {
        "Parameters": [f"{num_parameters(model):,}"],
        "Steps": ["120 of 200"],
        "Tokens seen": ["7,680"],
        "Training loss, nats per token": ["2.055"],
        "Validation loss, nats per token": ["2.055"],
        "Validation perplexity, per token": ["8.12"],
        "Validation bits per byte": ["1.234"],
        "the same of xz": ["2.345"],
        "Tokens per second, median": ["1.5K"],
        "Model FLOPs utilisation, median": ["25.0 %"],
        "Training time": ["1 h 03 min"],
    }


def test_the_page_needs_nothing_beside_it(full):
    page = Page(full)
    assert len(page.references) == 14  # seven pictures, each by step and by tokens
    assert all(reference.startswith("data:image/png;base64,iVBORw0KGgo") for reference in page.references)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import", page.text)


def test_a_limit_is_a_row_and_a_line(tmp_path):
    figures = {"step": 120, "split": "validation", "tokens": 1000, "bytes": 4000, "limit_nats": 1234.5,
               "excess_nats_per_document": 3.456, "excess_percent": 4.56}  # fmt: skip
    run = make_run(tmp_path / "run")
    without = {path: path.read_bytes() for path in write_report([run]).with_suffix("").iterdir()}
    table = Page(write_report([run], final=figures)).table
    assert table["Limit of the validation loss, nats per token"] == ["1.2345"]
    assert table["Excess over the limit"] == ["4.6 %"]
    assert table["Excess over the limit, nats per document"] == ["3.46"]
    changed = {path.name.partition("_by_")[0] for path, picture in without.items() if path.read_bytes() != picture}
    assert changed == {"loss", "perplexity", "bits_per_byte"}


def test_samples_are_escaped(full):
    page = Page(full)
    assert "<script" not in page.text
    assert (
        "&lt;script src=&#39;https://example.com/x.js&#39;&gt;alert(1)&lt;/script&gt; &amp; &#34;more&#34;" in page.text
    )
    assert page.text.index("step 120") < page.text.index("0 &lt;script") < page.text.index("1 &lt;script")


def test_the_pictures_lie_beside_the_page(full):
    pictures = sorted(path.name for path in (full.parent / "report").iterdir())
    names = ["bits_per_byte", "grad_norm", "learning_rate", "loss", "mfu", "perplexity", "tokens_per_second"]
    assert pictures == sorted(f"{name}_by_{axis}.png" for name in names for axis in ("step", "tokens"))
    assert all((full.parent / "report" / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert not list(full.parent.rglob("*.tmp"))


def test_the_configuration_is_shown(full):
    assert "embed_dim: 32" in full.read_text().split("<h2>Configuration</h2>")[1]


def test_the_same_run_gives_the_same_bytes(full):
    before = full.read_bytes()
    assert write_report([full.parent]).read_bytes() == before


def test_a_run_without_evaluation_samples_or_mfu(tmp_path):
    run = make_run(tmp_path / "plain", steps=3)
    page = Page(write_report([run]))
    assert "Validation perplexity, per token" not in page.table
    assert "Model FLOPs utilisation, median" not in page.table
    assert page.table["Training time"] == ["1 min 34 s"]
    assert len(page.references) == 8 and "<h2>Samples</h2>" not in page.text


def test_figures_that_are_not_on_disk_yet(tmp_path):
    run = make_run(tmp_path / "run")
    page = write_report([run], final={"step": 120, "split": "validation", "perplexity": 8.5})
    assert Page(page).table["Validation perplexity, per token"] == ["8.50"]


def test_figures_from_before_the_run_went_on_are_not_shown(tmp_path):
    run = make_run(tmp_path / "run", steps=121)
    add_results(run)
    table = Page(write_report([run])).table
    assert "the same of xz" not in table
    assert table["Validation bits per byte"] == ["1.027"]  # of the last evaluation


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path):
    page, pictures = tmp_path / "all.html", tmp_path / "all"
    write_report([make_run(tmp_path / "a", mfu=0.5)], page)
    assert (pictures / "mfu_by_step.png").exists()
    (pictures / "notes.txt").touch()
    write_report([make_run(tmp_path / "b", steps=3)], page)
    names = sorted(path.name.removesuffix("_by_step.png") for path in pictures.glob("*_by_step.png"))
    assert names == ["grad_norm", "learning_rate", "loss", "tokens_per_second"]
    assert (pictures / "notes.txt").exists()


@pytest.mark.parametrize("name", ["comparison", "comparison.htm"])
def test_a_page_is_called_html(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name}: the name of a page must end in \.html, such as {name}\.html"):
        write_report([make_run(tmp_path / "run")], tmp_path / name)
    assert not (tmp_path / name).exists()


def test_runs_side_by_side(tmp_path):
    first, second = make_run(tmp_path / "a"), make_run(tmp_path / "b", batch_size=8, mfu=0.5)
    add_results(second)
    path = write_report([first, second])
    assert path == tmp_path / "report.html" and (tmp_path / "report").is_dir()
    table = Page(path).table
    assert table[""] == ["a", "b"]
    assert table["Tokens seen"] == ["7,680", "15,360"]
    assert table["the same of xz"] == ["–", "2.345"]
    assert table["train.batch_size"] == ["4", "8"]  # what differs, and nothing else
    assert not any(key.startswith("model.") for key in table)


def test_runs_of_one_name_are_told_apart_and_out_is_used(tmp_path):
    runs = [make_run(tmp_path / "x" / "same"), make_run(tmp_path / "y" / "same", batch_size=8)]
    path = write_report(runs, tmp_path / "deep" / "comparison.html")
    assert path == tmp_path / "deep" / "comparison.html" and (tmp_path / "deep" / "comparison").is_dir()
    assert Page(path).table[""] == [str(run) for run in runs]


def test_what_is_missing_is_said(tmp_path):
    run = make_run(tmp_path / "run")
    with pytest.raises(UserError, match="no run to report on"):
        write_report([])
    with pytest.raises(UserError, match="elsewhere: no run here"):
        write_report([run, tmp_path / "elsewhere"])
    for make in (Path.unlink, Path.touch):
        make(run / "metrics.jsonl")
        with pytest.raises(UserError, match=r"logged no step yet.*gpt1 train .*config\.yaml"):
            write_report([run])
    assert not (run / "report.html").exists()


def test_a_damaged_file_is_named(tmp_path):
    run = make_run(tmp_path / "run")
    (run / "evaluation.json").write_text("[1, 2")
    with pytest.raises(DamagedError, match=r"evaluation\.json"):
        write_report([run])
    (run / "metrics.jsonl").write_text('{"loss": 1.0}\n')
    with pytest.raises(DamagedError, match=r"metrics\.jsonl:1: the record lacks step, tokens"):
        write_report([run])
    (run / "metrics.jsonl").write_text('{"step": 1, "tokens": 4, "loss": 1.0}\n{]\n{}\n')
    with pytest.raises(DamagedError, match=r"metrics\.jsonl:2: not a line of JSON"):
        write_report([run])
