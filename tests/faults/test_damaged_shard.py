"""Whatever becomes of a file of a prepared corpus: nothing of it is used, and it is named."""

import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from gpt1_jax.config import Config
from gpt1_jax.config_file import load_config, parse_config
from gpt1_jax.data.corpus import Corpus
from gpt1_jax.data.documents import read_documents
from gpt1_jax.data.manifest import MANIFEST, SPLITS
from gpt1_jax.data.prepare import corpus_dir, prepare
from gpt1_jax.data.windows import RandomWindows
from gpt1_jax.errors import DamagedError
from tests.conftest import MODEL_YAML
from tests.faults.conftest import Row
from tests.faults.damage import Damage, flip, spoil
from tests.running import Running, check_same, last_step

FLIPS = 70


@pytest.fixture(scope="module")
def configs(corpus_yaml: str) -> tuple[Config, Config]:
    """Of a corpus of many shards, and of another of the same sources, whose files have the same names."""
    ours = corpus_yaml + "  shard_tokens: 4000\n" + MODEL_YAML + "evaluation: {sample_tokens: 8}\n"
    return parse_config(ours, "ours"), parse_config(ours.replace("fraction: 0.1", "fraction: 0.2"), "foreign")


def read(config: Config) -> list[bytes]:
    """All that training, evaluation and ``gpt1 data show`` read of a corpus, found and opened as by ``gpt1 train``."""
    corpus = Corpus(prepare(config), config.data.verify, config.data.readers)
    windows = RandomWindows(corpus, config.context_length, config.seed)
    found = [corpus.tokenizer().to_bytes(), windows.examples(np.arange(2 * windows.windows_per_epoch.sum())).tobytes()]
    for split in SPLITS:
        tokens = corpus.tokens(split)
        found.append(tokens.read(0, len(tokens)).tobytes())
        found += [corpus.offsets(shard).tobytes() for shard in corpus.manifest.shards_of(split)]
        found += [f"{identity} {text}".encode() for text, identity in read_documents(corpus.folder, split, corpus.sums)]
    return found


def damages(ours: Path, foreign: Path, seed: random.Random) -> list[tuple[str, Damage]]:
    """Names of files, each with what becomes of it."""
    files = {str(path.relative_to(ours)): path.read_bytes() for path in sorted(ours.rglob("*")) if path.is_file()}

    def flip_one(content: bytes) -> Damage:
        return flip(seed.randrange(8 * len(content)))

    found: list[tuple[str, Damage]] = []
    for name, content in files.items():
        found.append((name, lambda content: content[: seed.randrange(len(content))]))
        found.append((name, lambda content: None))
        found.append((name, flip_one(content)))
        other = (foreign / name).read_bytes() if (foreign / name).exists() else content
        if other != content:
            as_long = (other * (len(content) // len(other) + 1))[: len(content)]
            found += [(name, lambda content, other=other: other) for other in (other, as_long)]
    names = seed.choices(list(files), [len(content) for content in files.values()], k=FLIPS)
    return found + [(name, flip_one(files[name])) for name in names]


@pytest.mark.fault("damaged shard")
def test_no_damage_is_silent(configs, row: Row):
    ours, foreign = (Path(prepare(config)) for config in configs)
    expected = read(configs[0])
    for name, damage in damages(ours, foreign, random.Random(0)):
        path = ours / name
        content = path.read_bytes()
        spoil(path, damage)
        if name == MANIFEST and not path.exists():  # the preparation did not come to its end, and is made again
            assert read(configs[0]) == expected
        else:
            with pytest.raises(DamagedError) as refused:
                read(configs[0])
            assert str(path) in str(refused.value) and "run 'gpt1 prepare' again" in str(refused.value)
        path.write_bytes(content)
        row.tried()
    assert row.tries >= 100
    assert read(configs[0]) == expected


@pytest.mark.fault("damaged shard")
def test_train_names_it_and_goes_on_when_it_is_made_again(uninterrupted, make_folder, gpt1, row: Row):
    folder: Path = make_folder("shards")
    prepared = Path(corpus_dir(load_config(folder / "config.yaml")))
    corpus = Path(shutil.copytree(prepared, folder / "prepared" / prepared.name))
    root = f"data.root={folder / 'prepared'}"
    (documents,) = (path for path in corpus.rglob("*validation*") if "array_record" in path.name)
    # Tokens are read from the first step on, the text of the documents when the run is trained.
    for path, steps in ((corpus / "train-00-00000.tokens", 0), (documents, 60)):
        spoil(path, flip(path.stat().st_size // 2 * 8))
        ((code, out, err),) = Running(folder, root).finish()
        assert (code, out) == (DamagedError.exit_code, ""), err
        assert f"gpt1: {path}: this file of the corpus has SHA-256 " in err
        assert last_step(folder) == steps
        again = gpt1("prepare", folder / "config.yaml", root)
        assert again.code == 0, again.err
        row.tried()
    ((code, _, err),) = Running(folder, root).finish()
    assert code == 0, err
    check_same(folder, uninterrupted)
