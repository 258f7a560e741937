import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import transformers

from gpt1_jax.errors import DamagedError, GPT1Error, UserError
from gpt1_jax.interop.original import is_original, read_original

CONTEXT, WIDTH, VOCABULARY, LAYERS = 5, 4, 8, 2
PER_LAYER = [
    [1, WIDTH, 3 * WIDTH], [3 * WIDTH], [1, WIDTH, WIDTH], [WIDTH], [WIDTH], [WIDTH],
    [1, WIDTH, 4 * WIDTH], [4 * WIDTH], [1, 4 * WIDTH, WIDTH], [WIDTH], [WIDTH], [WIDTH],
]  # fmt: skip
SHAPES = [[CONTEXT, WIDTH], [VOCABULARY, WIDTH], *PER_LAYER * LAYERS]
TOTAL = sum(int(np.prod(shape)) for shape in SHAPES)


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """The authors' files, small: the numbers count up, and the pieces end where they like."""
    (tmp_path / "params_shapes.json").write_text(json.dumps(SHAPES))
    for number, piece in enumerate(np.array_split(np.arange(TOTAL, dtype=np.float32), 10)):
        np.save(tmp_path / f"params_{number}.npy", piece)
    tokens = ["<unk>", "a", "b", "a</w>", "b</w>", "ab</w>", "ba</w>", "\n</w>"]
    (tmp_path / "encoder_bpe_40000.json").write_text(json.dumps({token: n for n, token in enumerate(tokens)}))
    (tmp_path / "vocab_40000.bpe").write_text("#version: 0.2\na b</w>\nb a</w>\n")
    return tmp_path


def test_tensors_follow_each_other_in_the_authors_order(release):
    tensors, tokenizer = read_original(release)
    order = ["positions_embed.weight", "tokens_embed.weight"]
    for layer in range(LAYERS):
        names = ("attn.c_attn", "attn.c_proj", "ln_1", "mlp.c_fc", "mlp.c_proj", "ln_2")
        order += [f"h.{layer}.{name}.{part}" for name in names for part in ("weight", "bias")]
    assert list(tensors) == [f"transformer.{name}" for name in order]
    assert np.array_equal(np.concatenate([tensor.ravel() for tensor in tensors.values()]), np.arange(TOTAL))
    assert {tensor.dtype for tensor in tensors.values()} == {np.dtype(np.float32)}
    assert tensors["transformer.tokens_embed.weight"][0, 0] == CONTEXT * WIDTH
    assert tensors["transformer.h.0.attn.c_attn.weight"][1, 0] == (CONTEXT + VOCABULARY) * WIDTH + 3 * WIDTH
    assert tokenizer.encode("ab\nBA b").tolist() == [5, 7, 6, 4]


def test_names_and_shapes_are_those_of_the_public_class(release):
    sizes = {"vocab_size": VOCABULARY, "n_positions": CONTEXT, "n_embd": WIDTH, "n_layer": LAYERS, "n_head": 2}
    model = transformers.OpenAIGPTLMHeadModel(transformers.OpenAIGPTConfig(**sizes))
    expected = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    assert {name: tensor.shape for name, tensor in read_original(release)[0].items()} == expected


def test_a_folder_is_known_by_its_shapes(release):
    assert is_original(release)
    (release / "params_shapes.json").unlink()
    assert not is_original(release)
    with pytest.raises(UserError, match=r"missing: params_shapes\.json;"):
        read_original(release)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("params_0.npy", r"params_0\.npy: this file of weights is missing"),
        ("params_4.npy", r"params_4\.npy: this file of weights is missing"),
        ("encoder_bpe_40000.json", r"missing: encoder_bpe_40000\.json;"),
        ("vocab_40000.bpe", r"missing: vocab_40000\.bpe;"),
    ],
)
def test_a_missing_file_is_named(release, name, message):
    (release / name).unlink()
    with pytest.raises(UserError, match=message):
        read_original(release)


def test_the_last_piece_is_missed_by_its_numbers(release):
    (release / "params_9.npy").unlink()
    with pytest.raises(DamagedError, match=rf"params_0\.npy to params_8\.npy hold \d+ numbers, .* need {TOTAL};"):
        read_original(release)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ("[[5, 4], [8", "not JSON"),
        ("[[5, 4], [8, 0]]", "expected a list of shapes"),
        ("[[5, 4], [8, true]]", "expected a list of shapes"),
        (json.dumps(SHAPES[:-1]), "expected two embeddings and 12 tensors for each layer, found 25 shapes"),
        (json.dumps([]), "found 0 shapes, the first of them absent"),
        (json.dumps([*SHAPES[:4], [1, 4, 5], *SHAPES[5:]]),
         r"h\.0\.attn\.c_proj\.weight: expected the shape \[1, 4, 4\], found \[1, 4, 5\]"),
        (json.dumps([SHAPES[0], [8, 5], *SHAPES[2:]]),
         r"tokens_embed\.weight: expected the shape \[8, 4\], found \[8, 5\]"),
        (json.dumps([SHAPES[0], [2**30, 4], *SHAPES[2:]]), "need 4,294,"),
        (json.dumps([SHAPES[0], [9, 4], *SHAPES[2:]]), f"hold {TOTAL} numbers, .* need {TOTAL + 4};"),
    ],
)  # fmt: skip
def test_shapes_that_do_not_fit_are_refused(release, shapes, message):
    (release / "params_shapes.json").write_text(shapes)
    with pytest.raises(DamagedError, match=message):
        read_original(release)


def header(count: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({count},), }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a NumPy file"),
        (b"PK\x03\x04" + bytes(100), "not a NumPy file"),
        (pickle.dumps([1.0]), "not a NumPy file"),
        (b"\x93NUMPY\x02\x00" + b"\xff" * 4 + b"{}", "not a NumPy file"),
        (header("10**9"), "not a NumPy file"),
        (
            header("1000000000000") + bytes(400),
            r"expected 4,000,000,000,\d+ bytes for 1,000,000,000,000 numbers, found",
        ),
        (header("100") + bytes(399), "bytes for 100 numbers, found"),
    ],
)
def test_pieces_that_are_damaged_are_named(release, content, message):
    (release / "params_3.npy").write_bytes(content)
    with pytest.raises(DamagedError, match=rf"params_3\.npy: .*{message}"):
        read_original(release)


@pytest.mark.parametrize(
    ("array", "found"),
    [
        (np.zeros(9, np.float64), r"found float64 of the shape \[9\]"),
        (np.zeros((3, 3), np.float32), r"found float32 of the shape \[3, 3\]"),
        (np.zeros(9, np.int32), r"found int32 of the shape \[9\]"),
        (np.array([None]), r"found object of the shape \[1\]"),
    ],
)
def test_pieces_of_another_type_are_named(release, array, found):
    np.save(release / "params_3.npy", array)
    with pytest.raises(DamagedError, match=rf"params_3\.npy: expected a row of float32 numbers, {found}"):
        read_original(release)


def test_numbers_of_the_other_byte_order_are_read(release):
    piece = np.load(release / "params_3.npy")
    np.save(release / "params_3.npy", piece.astype(">f4"))
    tensors, _ = read_original(release)
    assert np.array_equal(np.concatenate([tensor.ravel() for tensor in tensors.values()]), np.arange(TOTAL))


def test_a_vocabulary_of_another_size_is_refused(release):
    (release / "encoder_bpe_40000.json").write_text('{"<unk>": 0}')
    (release / "vocab_40000.bpe").write_text("#version: 0.2\n")
    with pytest.raises(
        GPT1Error, match=r"encoder_bpe_40000\.json: it has 1 tokens, but .* gives the token embedding 8"
    ):
        read_original(release)
