"""Safetensors files: written shard by shard, opened without reading the tensors."""

import json
import re
from collections.abc import Iterable, Mapping
from itertools import islice
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from gpt1_jax.errors import DamagedError, UserError
from gpt1_jax.outside import parse_json, read_bounded

MODEL, INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16")
_SHARD = re.compile(r"[\w.-]+\.safetensors")  # never a path that leaves the folder
_MOST_INDEX = 10_000_000  # bytes


def write_weights(
    folder: Path, shapes: Mapping[str, tuple[int, ...]], tensors: Iterable[tuple[str, np.ndarray]], max_bytes: int
) -> list[str]:
    """Writes float32 tensors as one file, or as shards with an index where one would be above ``max_bytes``.

    Args:
        folder: where to.
        shapes: of every tensor, in the order of ``tensors``.
        tensors: drawn as they are needed, so that no more than one file's are in memory.
        max_bytes: of the tensors of one file, unless a single one has more.

    Returns:
        The names of the files with tensors.
    """
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        if shards[-1] and filled + size > max_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    count = len(shards)
    names = [MODEL] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    source = iter(tensors)
    for name, shard in zip(names, shards, strict=True):
        held = dict(islice(source, len(shard)))
        assert {tensor: value.shape for tensor, value in held.items()} == shard
        # transformers refuses a file whose metadata does not name a framework.
        save_file(held, folder / name, metadata={"format": "pt"})
        del held
    if count > 1:
        weight_map = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(4 * int(np.prod(shape)) for shape in shapes.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return names


class Weights:
    """The tensors of a model's safetensors files, by name; opening reads the headers alone.

    The library checks a header before anything is allocated for what it says: no longer than the file, nor than
    100 MB, known types, sizes that agree with the shapes, and tensors that lie one behind another to the file's end.

    Args:
        folder: that holds ``model.safetensors``, or shards and their index.

    Raises:
        UserError: if there are no such files.
        DamagedError: if one is missing, truncated or altered.
    """

    def __init__(self, folder: Path):
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self.paths: dict[str, Path] = {}
        for path in _files(folder):
            if not path.is_file():
                raise DamagedError(f"{path}: this file, which {INDEX} names, is missing; fetch it again")
            try:
                with safe_open(path, "numpy") as file:
                    for name in file.keys():
                        part = file.get_slice(name)
                        self.shapes[name], self.dtypes[name] = tuple(part.get_shape()), part.get_dtype()
                        self.paths[name] = path
            except SafetensorError as error:
                raise _damaged(path, error) from None

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32."""
        try:
            with safe_open(self.paths[name], "numpy") as file:
                return file.get_tensor(name).astype(np.float32, copy=False)
        except SafetensorError as error:
            raise _damaged(self.paths[name], error) from None

    def problems(self) -> list[str]:
        """What is stored in a type that is not taken: one line for each tensor."""
        return [
            f"{name}: stored as {dtype}, expected one of {', '.join(_FLOATS)}"
            for name, dtype in self.dtypes.items()
            if dtype not in _FLOATS
        ]


def _files(folder: Path) -> list[Path]:
    if (folder / MODEL).is_file():
        return [folder / MODEL]
    index = folder / INDEX
    if index.is_file():
        try:
            content = parse_json(read_bounded(index, _MOST_INDEX))
            names = sorted(set(content["weight_map"].values()))
            if not names or not all(map(_SHARD.fullmatch, names)):
                raise ValueError(f"it names {names[:3]}, which are not all {_SHARD.pattern}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{index}: not an index of shards: {error}; fetch it again") from None
        return [folder / name for name in names]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if pickled:
        raise UserError(
            f"{folder}: the weights are there as {pickled[0]} alone, a pickle, which could run any code; nothing is "
            f"unpickled here. Fetch {MODEL} instead, or let transformers convert it: "
            "AutoModelForCausalLM.from_pretrained(FOLDER).save_pretrained(NEW)"
        )
    raise UserError(f"{folder}: no weights here; expected {MODEL}, or shards with {INDEX}")


def _damaged(path: Path, error: Exception) -> DamagedError:
    return DamagedError(f"{path}: not a sound safetensors file: {error}; fetch it again")
