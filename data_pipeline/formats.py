"""Files to rows: jsonl, Parquet, Arrow and text, plain or compressed, from here or from a URL."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
from collections.abc import Callable, Iterable, Iterator
from typing import IO, Any

from data_pipeline.remote import RemoteFile, is_remote
from loglinear.errors import UserError

ROWS = 256  # that are decoded at once of a columnar file
ARROW_FILE = b"ARROW1"  # what an Arrow file begins with; a stream does not
BUFFER = 1 << 16  # bytes that are taken at once

Row = dict[str, Any]


def read_rows(kind: str, path: str, field: str) -> Iterator[Row]:
    """The rows of a file, with at least the field `field` if it has that.

    Args:
        kind: jsonl, parquet, arrow, or text, whose only row is the whole file.
        path: here or a URL; jsonl and text may be compressed, as its end says: .gz, .xz, .bz2 or .zst.
        field: which column of a columnar file to read.

    Raises:
        UserError: the file is missing, or a remote one stays dead.
        Exception: whatever a library says of a file that is damaged or of another kind.
    """
    if kind in COLUMNAR:
        with _open(path) as file:
            yield from COLUMNAR[kind](file, field)
        return
    with _open(path) as raw, _decompressed(raw, path) as file:
        if kind == "text":
            yield {field: file.read().decode()}
        else:
            yield from _json_rows(file)


def _open(path: str) -> IO[bytes]:
    if is_remote(path):
        return io.BufferedReader(RemoteFile(path), BUFFER)
    try:
        return open(path, "rb")
    except OSError as error:
        raise UserError(f"data.sources: cannot read {path} ({error.strerror})") from None


def _decompressed(file: IO[bytes], path: str) -> IO[bytes]:
    """`file` as what its name says that it is compressed from; a cut end raises EOFError."""
    openers: dict[str, Callable[[IO[bytes]], Any]] = {
        ".gz": gzip.open,
        ".xz": lzma.open,
        ".bz2": bz2.open,
        ".zst": lambda raw: io.BufferedReader(_Zstandard(raw)),
    }
    return next((opener(file) for end, opener in openers.items() if path.endswith(end)), file)


class _Zstandard(io.RawIOBase):
    """The content of a zst file, frame after frame. (The library's own reader takes a cut end for the end.)"""

    def __init__(self, file: IO[bytes]) -> None:
        import zstandard

        self._file = file
        self._new_frame = zstandard.ZstdDecompressor().decompressobj
        self._frame: Any = None
        self._input = self._output = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._output:
            self._input = self._input or self._file.read(BUFFER)
            if not self._input:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            self._frame = self._frame or self._new_frame()
            self._output, self._input = self._frame.decompress(self._input), b""
            if self._frame.eof:
                self._input, self._frame = self._frame.unused_data, None
        content, self._output = self._output[: len(buffer)], self._output[len(buffer) :]
        buffer[: len(content)] = content
        return len(content)


def _json_rows(file: IO[bytes]) -> Iterator[Row]:
    for number, line in enumerate(file):
        if line.isspace():
            continue
        row = json.loads(line.decode())
        if not isinstance(row, dict):
            raise ValueError(f"line {number + 1} is no JSON object")
        yield row


def _parquet_rows(file: IO[bytes], field: str) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    parquet = ParquetFile(file, pre_buffer=False)  # which would read the whole file first
    known = parquet.schema_arrow.names
    yield from _column(parquet.iter_batches(ROWS, columns=[field] if field in known else None), field)


def _arrow_rows(file: IO[bytes], field: str) -> Iterator[Row]:
    from pyarrow import ipc

    begins = file.read(len(ARROW_FILE))
    file.seek(0)
    if begins == ARROW_FILE:
        reader = ipc.open_file(file)
        yield from _column(map(reader.get_batch, range(reader.num_record_batches)), field)
    else:
        yield from _column(ipc.open_stream(file), field)


def _column(batches: Iterable[Any], field: str) -> Iterator[Row]:
    """The rows of record batches, cut down to `field` if they have it."""
    for batch in batches:
        wanted = batch.select([field]) if field in batch.schema.names else batch
        for start in range(0, wanted.num_rows, ROWS):
            yield from wanted.slice(start, ROWS).to_pylist()


COLUMNAR = {"parquet": _parquet_rows, "arrow": _arrow_rows}
