"""Every command with a tokenizer of the ``tokenizers`` library in the place of a SentencePiece model."""

import json
import string
import sys
from pathlib import Path

import pytest

from gpt1_jax import cli
from gpt1_jax.interop.original_tokenizer import original_tokenizer
from gpt1_jax.training.run import open_run


@pytest.mark.slow
def test_every_command_takes_a_tokenizers_json(run_yaml, tmp_path, monkeypatch, capsys):
    # The authors' kind, of characters: it puts text in lower case, and <unk> between documents.
    characters = [*string.ascii_lowercase, *string.digits, *string.punctuation]
    tokens = ["<unk>", *characters, *(character + "</w>" for character in characters), "\n</w>"]
    vocabulary = json.dumps({token: number for number, token in enumerate(tokens)}).encode()
    tokenizer = original_tokenizer(vocabulary, b"#version: 0.2\n")
    content = tokenizer.to_bytes()

    def gpt1(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["gpt1", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        shown = capsys.readouterr()
        assert ended.value.code == 0, shown.err
        return shown.out

    (tmp_path / "tokenizer.json").write_bytes(content)
    path = tmp_path / "config.yaml"
    path.write_text(f"name: run\nruns_dir: {tmp_path}\n{run_yaml}")
    overrides = [f"data.tokenizer.file={tmp_path / 'tokenizer.json'}", f"model.vocab_size={tokenizer.vocab_size}",
                 f"data.root={tmp_path}", "train.steps=4", "evaluation.every=4"]  # fmt: skip
    corpus = Path(json.loads(gpt1("prepare", path, *overrides, "--json"))["path"])
    assert (corpus / "tokenizer.model").read_bytes() == content
    gpt1("train", path, *overrides)
    run = open_run(tmp_path / "run")
    assert run.tokenizer.to_bytes() == content
    assert (tmp_path / "run/checkpoints/4/run/tokenizer.model").read_bytes() == content
    (tmp_path / "text.txt").write_text("The cat sat on the mat.")
    figures = json.loads(gpt1("evaluate", tmp_path / "run", "--text", tmp_path / "text.txt", "--json"))
    assert figures["tokens"] == len(tokenizer.encode("The cat sat on the mat.")) + 1
    generated = json.loads(gpt1("generate", tmp_path / "run", "The CAT", "--tokens", "5", "--json"))
    assert generated["prompt"] == "The CAT"
    assert generated["completion"] == generated["completion"].lower()
    gpt1("train", path, *overrides, "train.log_every=2")  # resumed: the stored tokenizer is the corpus's
