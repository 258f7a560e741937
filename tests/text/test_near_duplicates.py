import hashlib
import os
import random
import subprocess
import sys
import zlib
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.extra import numpy as st_numpy

from gpt1_jax.config import NearDuplicates
from gpt1_jax.errors import UserError
from gpt1_jax.text import near_duplicates as module
from gpt1_jax.text.near_duplicates import (
    band_keys,
    check_near_duplicates,
    is_near_duplicate,
    near_duplicates,
    signature,
)

TEXT = "The quick brown fox jumps over the lazy dog, and nobody saw it but the owl in the old oak tree."


def test_an_estimate_is_near_the_exact_similarity():
    config = NearDuplicates(permutations=512)
    rng = random.Random(0)
    for shared in range(0, 400, 40):
        common, one, two = ([f"w{rng.getrandbits(40)}" for _ in range(count)] for count in (shared, 400 - shared, 300))
        first, second = common + one, common + two
        sets = [{tuple(words[start : start + 5]) for start in range(len(words) - 4)} for words in (first, second)]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        estimate = np.mean(signature(" ".join(first), config) == signature(" ".join(second), config))
        assert abs(estimate - exact) <= 4 * np.sqrt(max(exact * (1 - exact), 1e-9) / 512)  # four standard deviations


def test_a_signature_is_the_least_hash_of_every_ngram(monkeypatch: pytest.MonkeyPatch):
    """Against whole numbers of Python, one n-gram at a time, and the library's formula for its permutations."""
    monkeypatch.setattr(module, "_BLOCK", 4)  # several blocks, the last of them short
    config = NearDuplicates(ngram=3, permutations=16)
    words = "the quick brown fox jumps over the lazy dog and nobody saw it but the owl in the old oak tree".split()
    odd, added = module._permutations(16).tolist()
    least = [2**32] * 16
    for start in range(len(words) - 2):
        value = 0
        for word in words[start : start + 3]:
            value = (value + zlib.crc32(word.encode())) * 0x9E3779B97F4A7C15 % 2**64
        value >>= 32
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):  # the finalizer of MurmurHash3
            value = (value ^ (value >> shift)) * factor % 2**32
        least = [min(low, (a * value + b) % 2**32) for low, a, b in zip(least, odd, added, strict=True)]
    found = signature(TEXT, config)
    assert found.dtype == np.uint32
    assert found.tolist() == least


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (TEXT, TEXT.upper().replace(" ", "\n\t"), True),
        (TEXT, TEXT.replace(",", "").replace(".", "!?"), True),
        (TEXT, "_" + TEXT.replace("quick", "quíck").replace("í", "i") + "_", True),
        ("ﬁne words", "fine words", True),
        (TEXT, TEXT.replace("fox", "cat"), False),
        ("one two", "two one", False),
        ("one two", "one", False),
        ("!!!", "???", False),
        ("", "?", False),
    ],
)
def test_what_says_the_same_has_the_same_signature(one: str, other: str, same: bool):
    config = NearDuplicates()
    assert bool((signature(one, config) == signature(other, config)).all()) == same


def test_any_process_gives_the_same():
    code = (
        "import hashlib, numpy as np; from gpt1_jax.config import NearDuplicates\n"
        "from gpt1_jax.text.near_duplicates import band_keys, signature\n"
        f"found = signature({TEXT!r}, NearDuplicates())[None]\n"
        "print(hashlib.sha256(found.tobytes() + band_keys(found, NearDuplicates()).tobytes()).hexdigest())"
    )
    found = signature(TEXT, NearDuplicates())[None]
    here = hashlib.sha256(found.tobytes() + band_keys(found, NearDuplicates()).tobytes()).hexdigest()
    for seed in ("0", "7"):
        environment = os.environ | {"PYTHONHASHSEED": seed}
        there = subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
        )
        assert there.stdout.strip() == here
    # Of datasketch 2.0.0; another version that gives other numbers must give other corpora other names.
    assert found[0, :3].tolist() == [420902447, 640920440, 167303021]


SMALL = NearDuplicates(threshold=0.5, permutations=8)


def by_the_definition(signatures: np.ndarray, config: NearDuplicates) -> list[bool]:
    """Document by document, bucket by bucket."""
    bands, rows = module._bands(config)
    dropped = []
    for document in signatures:
        near = False
        for band in range(bands):
            part = slice(band * rows, (band + 1) * rows)
            first = next(other for other in signatures if (other[part] == document[part]).all())
            agree = sum(int(a == b) for a, b in zip(first, document, strict=True))
            near = near or (first is not document and agree / len(document) >= config.threshold)
        dropped.append(near)
    return dropped


@hypothesis.given(
    st_numpy.arrays(np.uint32, st.tuples(st.integers(0, 12), st.just(8)), elements=st.integers(0, 2)),
    st.sampled_from([1, 3, 4096]),
)
def test_what_is_dropped_is_what_the_definition_says(signatures: np.ndarray, block: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_BLOCK", block)
        found = near_duplicates(signatures, SMALL)
    # `first is not document` needs one object for each row
    assert found.tolist() == by_the_definition(list(signatures), SMALL)


@hypothesis.given(st_numpy.arrays(np.uint32, st.tuples(st.integers(1, 9), st.just(8)), elements=st.integers(0, 1)))
def test_buckets_are_those_of_equal_bands(signatures: np.ndarray):
    bands, rows = module._bands(SMALL)
    keys = band_keys(signatures, SMALL)
    assert keys.shape == (len(signatures), bands) and keys.dtype == np.uint64
    parts = signatures[:, : bands * rows].reshape(-1, bands, rows)
    same_part = (parts[:, None] == parts[None]).all(-1)
    np.testing.assert_array_equal(keys[:, None] == keys[None], same_part)
    assert bands == 1 or not np.isin(keys[:, 0], keys[:, 1]).any()  # equal entries of another band are another bucket


def test_the_first_of_a_bucket_counts_even_if_it_is_dropped_itself():
    rng = random.Random(1)
    words = [f"w{number}" for number in range(300)]
    texts = [" ".join(words)]
    for _ in range(3):  # each a copy of the one before, with every fiftieth word changed
        words = [f"x{rng.getrandbits(30)}" if rng.random() < 0.02 else word for word in words]
        texts.append(" ".join(words))
    other = " ".join(f"y{number}" for number in range(300))
    signatures = np.stack([signature(text, NearDuplicates()) for text in [other, *texts]])
    assert near_duplicates(signatures, NearDuplicates()).tolist() == [False, False, True, True, True]
    assert near_duplicates(signatures[::-1], NearDuplicates()).tolist() == [False, True, True, True, False]


def test_the_threshold_itself_is_near_enough():
    first = np.arange(8, dtype=np.uint32)
    later = np.stack([np.where(np.arange(8) < agree, first, 99) for agree in (3, 4, 5)]).astype(np.uint32)
    assert is_near_duplicate(first, later, SMALL).tolist() == [False, True, True]


def test_signatures_may_lie_in_a_file(tmp_path: Path):
    signatures = np.stack([signature(f"{TEXT} {number % 7}", NearDuplicates()) for number in range(20)])
    np.save(tmp_path / "signatures.npy", signatures)
    mapped = np.load(tmp_path / "signatures.npy", mmap_mode="r")
    np.testing.assert_array_equal(
        near_duplicates(mapped, NearDuplicates()), near_duplicates(signatures, NearDuplicates())
    )


def test_a_signature_too_short_for_the_threshold_is_refused_early():
    check_near_duplicates(NearDuplicates())
    with pytest.raises(UserError, match=r"threshold=0.99 with permutations=4: .*lower the threshold or take more"):
        check_near_duplicates(NearDuplicates(threshold=0.99, permutations=4))


def test_a_missing_library_is_named_early(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    module._bands.cache_clear()
    with pytest.raises(UserError, match=r"datasketch.*pip install 'gpt1-jax\[quality\]'"):
        check_near_duplicates(NearDuplicates())
