"""Rows of the tables that a task names: files, datasets of TFDS and of Hugging Face, examples made by rules."""

import csv
import gzip
import io
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from gpt1_jax.errors import DamagedError, StorageError, UserError, nearest
from gpt1_jax.task_config import Table, TableFiles, TableHuggingFace, TableTfds, TableToy
from gpt1_jax.text.compression import DAMAGE
from gpt1_jax.text.files import contents, file_type, matched, seekable
from gpt1_jax.text.huggingface import datasets_library
from gpt1_jax.text.toy import toy_rows

_BATCH = 1024  # rows of a Parquet file held at once


class Row(NamedTuple):
    """A row, and where it stands, for messages: ``task.train: data/moods.tsv:12``."""

    where: str
    cells: Mapping[str, Any]


def read_table(table: Table, key: str, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table in its order, in bounded memory.

    Args:
        table: where they are.
        key: the table's name in the configuration, such as ``task.train``.
        columns: what will be asked for; a table that has no such column is refused at its first row.

    Raises:
        UserError: if a file, a dataset or a column is not there, or a row is malformed.
        DamagedError: if a local file cannot be read to its end.
        StorageError: if a remote one cannot.
    """
    match table:
        case TableFiles():
            rows = _files(table, key, columns)
        case TableTfds():
            rows = _tfds(table, key, columns)
        case TableHuggingFace():
            rows = _hugging_face(table, key, columns)
        case TableToy():
            made = toy_rows(table.kind, table.split, table.rows, table.seed)
            rows = _checked(_numbered(made, f"{key}: {table.kind}/{table.split}"), columns)
    return itertools.islice(rows, table.rows)


def value(row: Row, column: str) -> Any:
    """What a row holds in a column, or with a dotted name in a field of a record there.

    Raises:
        UserError: if the row has no such column.
    """
    if column in row.cells:
        return row.cells[column]
    found: Any = row.cells
    for name in column.split("."):
        if not isinstance(found, Mapping) or name not in found:
            raise _missing(row.where, column, found if isinstance(found, Mapping) else row.cells)
        found = found[name]
    return found


def _numbered(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[Row]:
    return (Row(f"{name}:{number}", cells) for number, cells in enumerate(rows))


def _checked(rows: Iterable[Row], columns: Sequence[str]) -> Iterator[Row]:
    for row in rows:
        _check(row.cells, columns, row.where)
        yield row


def _check(names: Iterable[str], columns: Sequence[str], where: str) -> None:
    """Refuses a table without one of the columns, or, of a dotted name, without the column that holds the record."""
    names = list(names)
    for column in columns:
        if column not in names and column.partition(".")[0] not in names:
            raise _missing(where, column, names)


def _missing(where: str, column: str, names: Iterable[str]) -> UserError:
    names = list(names)
    return UserError(
        f"{where}: there is no column '{column}'; there are: {', '.join(names[:20]) or 'none'}{nearest(column, names)}"
    )


def _files(table: TableFiles, key: str, columns: Sequence[str]) -> Iterator[Row]:
    for path in matched(table.paths, f"{key}.paths"):
        where = f"{key}: {path}"
        try:
            with contents(path) as file:
                match file_type(path):
                    case "csv" | "tsv":
                        yield from _cells(file, path, table, where, columns)
                    case "jsonl":
                        yield from _checked(_records(file, where), columns)
                    case "parquet":
                        yield from _parquet(file, path, where, columns)
                    case _:
                        raise UserError(f"{where}: its name ends in none of .csv .tsv .jsonl .parquet (.gz .zst .xz)")
        except UnicodeDecodeError as error:
            raise UserError(f"{where}: it is not UTF-8: {error}; save it as UTF-8") from None
        except DAMAGE as error:
            if "://" in path and isinstance(error, OSError) and not isinstance(error, gzip.BadGzipFile):
                raise StorageError(f"{where}: cannot be read: {error}; run the same command again") from None
            raise DamagedError(f"{where}: it is damaged or cannot be read: {error}") from None


def _cells(file: BinaryIO, path: str, table: TableFiles, where: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of .csv and .tsv, each under the number of the line that it begins on."""
    comma = file_type(path) == "csv"
    quoted = comma if table.quoted is None else table.quoted
    hint = f"'quoted' says whether quotation marks enclose cells, and is {json.dumps(quoted)}"
    names: list[str] | None = None
    line = 1
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        quoting = csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE
        reader = csv.reader(text, delimiter="," if comma else "\t", quoting=quoting, strict=True)
        try:
            for cells in reader:
                place, line = f"{where}:{line}", reader.line_num + 1
                if not cells:
                    continue
                if names is None:
                    names = cells if table.header else [str(number) for number in range(len(cells))]
                    _check_names(names, place)
                    _check(names, columns, place)
                    if table.header:
                        continue
                if len(cells) != len(names):
                    raise UserError(f"{place}: {len(cells)} cells, but {len(names)} columns; {hint}")
                yield Row(place, dict(zip(names, cells, strict=True)))
        except csv.Error as error:
            raise UserError(f"{where}:{line}: {error}; {hint}") from None


def _check_names(names: list[str], where: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{where}: two columns are called '{twice}'; header: false says that there are no names")


def _records(file: BinaryIO, where: str) -> Iterator[Row]:
    for number, line in enumerate(file, 1):
        if not line.strip():
            continue
        place = f"{where}:{number}"
        try:
            record = json.loads(line)
        except UnicodeDecodeError:
            raise
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: it is not valid JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{place}: it is not a JSON object")
        yield Row(place, record)


def _parquet(file: BinaryIO, path: str, where: str, columns: Sequence[str]) -> Iterator[Row]:
    with closing(seekable(file, path)) as whole:
        try:
            table = pq.ParquetFile(whole)
            names = table.schema_arrow.names
            _check(names, columns, where)
            read = [column if column in names else column.partition(".")[0] for column in columns]
            batches = table.iter_batches(batch_size=_BATCH, columns=list(dict.fromkeys(read)))
            yield from _numbered((cells for batch in batches for cells in batch.to_pylist()), where)
        except pa.ArrowException as error:
            raise DamagedError(f"{where}: it is not a sound Parquet file: {error}") from None


def _tfds(table: TableTfds, key: str, columns: Sequence[str]) -> Iterator[Row]:
    from gpt1_jax.text.tfds import open_builder, open_records, plain  # half a second to import

    name = f"{key}: {table.dataset}/{table.split}"
    builder = open_builder(table.dataset, table.data_dir, key)
    features = builder.info.features
    _check(features, columns, name)
    records = open_records(builder, table.dataset, table.split, key)
    for number in range(len(records)):
        try:
            cells = plain(records[number], features)
        except UnicodeDecodeError as error:
            raise UserError(f"{name}:{number}: it is not UTF-8: {error}; choose a dataset whose texts are") from None
        yield Row(f"{name}:{number}", cells)


def _hugging_face(table: TableHuggingFace, key: str, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a dataset that the library keeps on this machine, as memory-mapped files, once it has fetched it."""
    library = datasets_library(key)
    name = f"{key}: {table.dataset}/{table.split}"
    files = matched(table.files, f"{key}.files") or None
    try:
        dataset = library.load_dataset(table.dataset, table.subset, data_files=files, split=table.split)
    except Exception as error:  # the library raises many kinds, its own and of others
        raise UserError(f"{key}: dataset '{table.dataset}', split '{table.split}': {error}") from None
    _check(dataset.column_names, columns, name)
    yield from _numbered(dataset, name)
