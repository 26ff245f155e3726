"""Files at a URL, read through fsspec as if the network never failed; or the name of the one that stays dead."""

from __future__ import annotations

import asyncio
import io
import logging
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from loglinear.errors import UserError

RETRIES = 7  # in a row; after each the wait doubles, so two minutes in all
FIRST_WAIT = 1.0  # seconds
STALL = 60.0  # seconds without a byte after which a connection counts as lost
BLOCK = 4 << 20  # bytes of a request
PASSING = frozenset({408, 425, 429})  # HTTP's answers that are worth another try, beside all from 500 on

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


def is_remote(path: str) -> bool:
    """Whether `path` is a URL."""
    return "://" in path


def expand(url: str) -> list[str]:
    """The files that `url` names or, where the store can list its files, matches; sorted.

    Raises:
        UserError: the store is of an unknown kind, refuses, or stays dead.
    """
    if not any(mark in url for mark in "*["):
        return [url]
    files, path = _open_store(url)
    return [files.unstrip_protocol(name) for name in sorted(_retried(lambda: files.glob(path), url))]


class RemoteFile(io.RawIOBase):
    """The bytes of `url` from first to last; a connection that fails is opened again where it broke off.

    Every read raises `UserError` if the file has gone, has changed, or stays dead.
    """

    def __init__(self, url: str) -> None:
        """Open `url`."""
        self._url = url
        self._files, self._path = _open_store(url)
        self._position = 0
        self._file: Any = None
        self._size: int | None = None
        self._seekable = False
        self._whole = False  # whether the server gives the file only from its start on
        _retried(self._connect, url)

    def readable(self) -> bool:
        """Always."""
        return True

    def seekable(self) -> bool:
        """Whether the server gives parts of a file."""
        return self._seekable

    def tell(self) -> int:
        """The place of the next byte."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place, as for any file."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size or 0}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:
        """Read at most as many bytes as `buffer` holds; 0 is the end."""
        content = _retried(lambda: self._read(len(buffer)), self._url)
        buffer[: len(content)] = content
        self._position += len(content)
        return len(content)

    def close(self) -> None:
        """Close the connection."""
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

    def _read(self, size: int) -> bytes:
        file = self._file or self._connect()
        try:
            if file.tell() != self._position:
                file.seek(self._position)
            content = file.read(size)
            if not content and size and self._size is not None and self._position < self._size:
                raise ConnectionError(f"it ended after {self._position} of {self._size} bytes")
        except Exception as error:
            self._file = None  # whatever its buffers hold is not to be trusted
            if isinstance(error, ValueError) and not self._whole:  # how fsspec says that the server gives no parts
                self._whole = True
                raise ConnectionError(str(error)) from error
            raise
        return content

    def _connect(self) -> Any:
        block = 0 if self._whole else BLOCK
        file = self._files.open(self._path, "rb", block_size=block, cache_type="readahead")
        size = getattr(file, "size", None)
        if None not in (size, self._size) and size != self._size:
            raise UserError(
                f"data.sources: {self._url} changed from {self._size} to {size} bytes while it was read;"
                " set another data.dir and prepare anew"
            )
        self._seekable = size is not None and file.seekable()
        if not self._seekable:
            _discard(file, self._position)
        self._file, self._size = file, size or self._size
        return file


def _discard(file: Any, count: int) -> None:
    """Read `count` bytes that are known already, from a server that cannot skip them."""
    while count > 0:
        content = file.read(min(count, BLOCK))
        if not content:
            raise ConnectionError("it ended before the place where it broke off")
        count -= len(content)


def _open_store(url: str) -> tuple[Any, str]:
    """The file system of `url`, and the path in it."""
    import aiohttp
    import fsspec

    options = {}
    if url.startswith("http"):
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=STALL, sock_read=STALL)
        options["client_kwargs"] = {"timeout": timeout}
    try:
        return fsspec.core.url_to_fs(url, **options)
    except (ValueError, ImportError) as error:
        raise UserError(
            f"data.sources: cannot open {url} ({error}); for s3 and gs install `loglinear[remote]`"
        ) from None


def _retried(action: Callable[[], Result], url: str) -> Result:
    """What `action` returns, tried again after failures that may pass."""
    for attempt in range(RETRIES + 1):
        try:
            return action()
        except UserError:
            raise
        except Exception as error:
            said = _words(error)
            if not _may_pass(error):
                raise UserError(f"data.sources: cannot read {url} ({said}); correct the path, or the access") from None
            if attempt < RETRIES:
                wait = FIRST_WAIT * 2**attempt
                _log.warning("%s: %s; trying again in %g s", url, said, wait)
                time.sleep(wait)
    raise UserError(
        f"data.sources: {url} stays dead: {RETRIES + 1} attempts in a row failed, the last with: {said};"
        " run the same command again when it is back"
    )


def _may_pass(error: BaseException) -> bool:
    """Whether another try may help; fsspec hides the reason of a failure in the chain of causes."""
    from aiohttp import ClientError, ClientResponseError

    chain = list(_causes(error))
    statuses = [cause.status for cause in chain if isinstance(cause, ClientResponseError)]
    if statuses:
        return any(status >= 500 or status in PASSING for status in statuses)
    if any(isinstance(cause, ClientError | TimeoutError | asyncio.TimeoutError | ConnectionError) for cause in chain):
        return True
    return isinstance(error, OSError) and not isinstance(error, FileNotFoundError | PermissionError)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _words(error: BaseException) -> str:
    """The innermost reason in one line."""
    *_, innermost = _causes(error)
    return next(iter(str(innermost).splitlines()), "") or type(innermost).__name__
