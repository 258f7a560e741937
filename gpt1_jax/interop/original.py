"""The authors' release of GPT-1: its weights by the names of the Hugging Face format, and its tokenizer.

The folder ``model/`` of openai/finetune-transformer-lm holds ``params_shapes.json``, a list of shapes, and the numbers
of all tensors in that order, one after another, cut into ``params_0.npy`` to ``params_9.npy`` without regard to where a
tensor ends. No tensor has a name there: its place in the list says what it is.

Reference: openai/finetune-transformer-lm, train.py (the order), text_utils.py (the tokenizer).
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gpt1_jax.config import ModelConfig
from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.interop.layout import POSITIONS, PREFIX, TOKENS, public_shapes
from gpt1_jax.interop.original_tokenizer import read_original_tokenizer
from gpt1_jax.outside import parse_json, read_bounded
from gpt1_jax.text.tokenizer import Tokenizer

SHAPES = "params_shapes.json"
ENCODER = "encoder_bpe_40000.json"
MERGES = "vocab_40000.bpe"
_PER_LAYER = 12
_MOST_SHAPES = 1_000_000  # bytes of the list


def is_original(folder: Path) -> bool:
    """Whether a folder holds the authors' release, or a part of it."""
    return (folder / SHAPES).is_file()


def read_original(folder: Path) -> tuple[dict[str, np.ndarray], Tokenizer]:
    """Reads the release.

    Args:
        folder: where its files are. Their sizes decide the number of layers, the widths and the context.

    Returns:
        The weights, float32, by their Hugging Face names, such as ``transformer.h.0.attn.c_attn.weight`` [D, 3D], and
        the tokenizer.

    Raises:
        UserError: if a file is not there.
        DamagedError: if a file does not hold what the others say.
    """
    folder = Path(folder)
    pieces = _pieces(folder)
    missing = [name for name in (SHAPES, ENCODER, MERGES) if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder}: missing: {', '.join(missing)}; give the folder 'model' of openai/finetune-transformer-lm with "
            "all its files"
        )
    shapes = _shapes(folder / SHAPES)
    numbers = _numbers(folder, pieces, sum(map(math.prod, shapes.values())))
    ends = np.cumsum([math.prod(shape) for shape in shapes.values()])
    tensors = {
        name: flat.reshape(shape[1:] if len(shape) == 3 else shape)
        for (name, shape), flat in zip(shapes.items(), np.split(numbers, ends[:-1]), strict=True)
    }
    tokenizer = read_original_tokenizer(folder / ENCODER, folder / MERGES)
    rows = len(tensors["transformer.tokens_embed.weight"])
    if tokenizer.vocab_size != rows:
        raise DamagedError(
            f"{folder / ENCODER}: it has {tokenizer.vocab_size:,} tokens, but {SHAPES} gives the token embedding "
            f"{rows:,} rows; take all files from one release"
        )
    return tensors, tokenizer


def _pieces(folder: Path) -> list[Path]:
    """The files of numbers, in order."""
    count = len(list(folder.glob("params_*.npy")))
    pieces = [folder / f"params_{number}.npy" for number in range(max(1, count))]
    for piece in pieces:
        if not piece.is_file():
            raise UserError(f"{piece}: this file of weights is missing; the release has params_0.npy to params_9.npy")
    return pieces


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor by its name, checked against the architecture."""
    found = _parsed_shapes(path)
    layers, rest = divmod(len(found) - 2, _PER_LAYER)
    if layers < 1 or rest or len(found[0]) != 2:
        raise DamagedError(
            f"{path}: expected two embeddings and {_PER_LAYER} tensors for each layer, found {len(found)} shapes, the "
            f"first of them {list(found[0]) if found else 'absent'}"
        )
    expected = _expected(found, layers)
    for (name, wanted), shape in zip(expected.items(), found, strict=True):
        if wanted != shape:
            raise DamagedError(f"{path}: {name}: expected the shape {list(wanted)}, found {list(shape)}")
    return expected


def _parsed_shapes(path: Path) -> list[tuple[int, ...]]:
    try:
        found: Any = parse_json(read_bounded(path, _MOST_SHAPES))
    except ValueError as error:  # of the encoding or the length, too
        raise DamagedError(f"{path}: not JSON: {error}") from None
    if not isinstance(found, list) or not all(
        isinstance(shape, list) and shape and all(type(size) is int and 0 < size < 2**31 for size in shape)
        for shape in found
    ):
        raise DamagedError(f"{path}: expected a list of shapes, such as [[512, 768], [40478, 768], ...]")
    return [tuple(shape) for shape in found]


def _expected(found: list[tuple[int, ...]], layers: int) -> dict[str, tuple[int, ...]]:
    """What the shapes must be, the sizes taken from the embeddings and from the first MLP."""
    context, width = found[0]
    inner = found[8][-1]
    sizes = {"context_length": context, "vocab_size": found[1][0], "num_layers": layers}
    public = public_shapes(ModelConfig(embed_dim=width, num_heads=1, mlp_dim=inner, **sizes))
    # The same order as there, but for the embeddings; a layer's kernels have a leading dimension of 1.
    embeddings = {name: public.pop(name) for name in (POSITIONS, TOKENS)}
    layered = {name: (1, *shape) if len(shape) == 2 else shape for name, shape in public.items()}
    return {PREFIX + name: shape for name, shape in (embeddings | layered).items()}


def _numbers(folder: Path, pieces: list[Path], total: int) -> np.ndarray:
    """All numbers of the pieces; nothing is allocated before the sizes of the files agree with it."""
    rows = [_row(piece) for piece in pieces]
    if (held := sum(row.count for row in rows)) != total:
        raise DamagedError(
            f"{folder}: {pieces[0].name} to {pieces[-1].name} hold {held:,} numbers, the shapes in {SHAPES} "
            f"need {total:,}; the release has params_0.npy to params_9.npy"
        )
    numbers = np.empty(total, np.float32)
    done = 0
    for piece, row in zip(pieces, rows, strict=True):
        numbers[done : done + row.count] = np.fromfile(piece, row.dtype, row.count, offset=row.offset)
        done += row.count
    return numbers


class _Row(NamedTuple):
    """Where the numbers of a file are, and of which byte order."""

    offset: int
    count: int
    dtype: np.dtype


def _row(piece: Path) -> _Row:
    """What a file holds, by its header, which is checked against the size of the file."""
    with open(piece, "rb") as file:
        try:
            version = np.lib.format.read_magic(file)
            read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, dtype = read(file)
        except Exception as error:  # a header is a Python literal, and what parses it raises many kinds
            raise DamagedError(f"{piece}: not a NumPy file: {error}") from None
        header = file.tell()
    if dtype.kind != "f" or dtype.itemsize != 4 or len(shape) != 1:
        raise DamagedError(f"{piece}: expected a row of float32 numbers, found {dtype} of the shape {list(shape)}")
    expected, size = header + shape[0] * dtype.itemsize, piece.stat().st_size
    if size != expected:
        raise DamagedError(f"{piece}: expected {expected:,} bytes for {shape[0]:,} numbers, found {size:,}")
    return _Row(header, shape[0], dtype)
