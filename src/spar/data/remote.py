"""Files as readers need them, here or elsewhere: a name, what tells two versions apart, and bytes by offset.

Elsewhere is what fsspec reads: `s3://`, `gs://`, `https://` and others of SCHEMES. Ranges are read, never whole files.
Credentials are those that fsspec's own packages find (their environment variables and configuration files). An address
with a user or a query is refused: a run keeps the names of its data, and a finished model carries them.
"""

import io
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar
from urllib.parse import urlsplit

from spar.common.errors import InputError, first_line
from spar.common.files import open_regular

T = TypeVar("T")
SCHEMES = ("s3", "gs", "gcs", "https", "http", "memory")
ADDRESS = re.compile(r"([A-Za-z][\w+.-]*)://")
_LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
VERSIONS = (
    "ETag", "etag", "md5Hash", "Content-MD5", "Digest", "LastModified", "last_modified", "Last-Modified", "mtime",
    "updated", "created",
)  # fmt: skip
TRIES, PAUSE = 4, 0.5  # attempts to read a range, and seconds before the second one, twice as many before each next
AHEAD = 4 * 2**20  # bytes that are read at once while a file is read from its beginning to its end


class ByteReader(Protocol):
    """An open file; `pread` gives fewer bytes than asked for at its end alone, and raises OSError."""

    size: int

    def pread(self, length: int, offset: int) -> bytes: ...

    def close(self) -> None: ...


class LocalReader:
    """A file of this machine."""

    def __init__(self, path: Path) -> None:
        with open_regular(path) as file:
            self._descriptor = os.dup(file.fileno())
        self.size = os.fstat(self._descriptor).st_size

    def pread(self, length: int, offset: int) -> bytes:
        return os.pread(self._descriptor, length, offset)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True)
class RemoteFile:
    """A file elsewhere, by its whole address."""

    address: str

    @property
    def name(self) -> str:
        return self.address.rpartition("/")[2]

    @property
    def stem(self) -> str:
        return self.name.rpartition(".")[0] or self.name

    def __str__(self) -> str:
        return shown(self.address)

    def stamp(self) -> dict[str, str]:
        """What differs between two versions of the file, as far as its server says."""
        info = _attempt(lambda: _filesystem(self.address).info(self.address), self)
        found = {"bytes": str(info.get("size"))}
        for name in VERSIONS:  # the first that there is: a listing and a request may write times differently
            if info.get(name) is not None:
                return found | {name: str(info[name])}
        return found

    def seekable(self) -> io.BufferedReader:
        """The file as Python's own, for libraries that read one; its ranges are tried again as any."""
        return io.BufferedReader(_RawRemote(RemoteReader(self)), buffer_size=2**20)


class RemoteReader:
    """Ranges of a file elsewhere, each tried TRIES times; `ahead` bytes are read at once and kept."""

    def __init__(self, file: RemoteFile, ahead: int = 0) -> None:
        size = _attempt(lambda: _filesystem(file.address).info(file.address), file).get("size")
        if not isinstance(size, int):
            raise OSError(f"{file}: its server does not say how large it is")
        self.size, self._file, self._ahead = size, file, ahead
        self._start, self._kept = 0, b""

    def pread(self, length: int, offset: int) -> bytes:
        end = min(offset + length, self.size)
        if offset >= end:
            return b""
        if not self._start <= offset <= end <= self._start + len(self._kept):
            stop = min(self.size, max(end, offset + self._ahead))
            self._kept = _attempt(lambda: self._range(offset, stop), self._file)
            self._start = offset
        return self._kept[offset - self._start : end - self._start]

    def _range(self, start: int, stop: int) -> bytes:
        data: bytes = _filesystem(self._file.address).cat_file(self._file.address, start, stop)
        if len(data) > stop - start:  # a server that knows no ranges sends all of it
            raise InputError(f"{self._file}: its server sends no ranges, got {len(data)} bytes of {stop - start}")
        if len(data) < stop - start:
            raise OSError("the answer is short")
        return data

    def close(self) -> None:
        self._kept = b""


class _RawRemote(io.RawIOBase):
    """A remote reader with a position."""

    def __init__(self, reader: RemoteReader) -> None:
        self._reader, self._position = reader, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._reader.size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._reader.pread(len(buffer), self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


DataFile = Path | RemoteFile


def is_remote(pattern: str) -> bool:
    """Whether a path or a pattern is an address that is read by ranges."""
    scheme = ADDRESS.match(pattern)
    return scheme is not None and scheme[1].lower() in SCHEMES


def check_address(pattern: str) -> None:
    """Refuse `http://` to another machine, since what is read could be changed on its way, and what may be a secret."""
    try:
        parts = urlsplit(pattern)
        host = parts.hostname
    except ValueError:
        raise InputError(f"expected an address such as https://HOST/FILES, got {shown(pattern)!r}") from None
    if parts.scheme == "http" and host not in _LOCAL_HOSTS:
        raise InputError(f"expected https:// (http:// is for this machine alone), got {shown(pattern)!r}")
    if "@" in parts.netloc or (parts.scheme in ("http", "https") and (parts.query or parts.fragment)):
        raise InputError(
            f"expected an address without a user and a query, which a run would keep, got {shown(pattern)!r}; give "
            "credentials as the packages of fsspec read them (environment variables, configuration files)"
        )


def normal(pattern: str) -> str:
    """An address with its scheme in lower case."""
    scheme, mark, rest = pattern.partition("://")
    return f"{scheme.lower()}{mark}{rest}"


def open_reader(file: DataFile, *, whole: bool = False) -> ByteReader:
    """Open a file; `whole`: it is read from its beginning to its end."""
    return RemoteReader(file, AHEAD if whole else 0) if isinstance(file, RemoteFile) else LocalReader(file)


def stamp_of(file: DataFile) -> dict[str, str]:
    """What differs between two versions of a file; raises OSError."""
    if isinstance(file, RemoteFile):
        return file.stamp()
    status = file.stat()
    return {"bytes": str(status.st_size), "mtime_ns": str(status.st_mtime_ns)}


def address_of(file: DataFile) -> bytes:
    """Where a file is, for the name of its index in a cache."""
    return file.address.encode() if isinstance(file, RemoteFile) else os.fsencode(file.absolute())


def find_remote(patterns: list[str]) -> list[RemoteFile]:
    """The files of addresses whose braces are expanded; globs are asked of the server, where it has folders.

    Raises:
        InputError: an address that matches nothing or cannot be read, or a package of fsspec that is missing.
    """
    found: list[RemoteFile] = []
    for given in patterns:
        pattern = normal(given)
        check_address(pattern)
        files = _filesystem(pattern)
        try:
            if re.search(r"[*?[]", pattern) and not pattern.startswith("http"):
                names = sorted(_attempt(lambda: files.glob(pattern), pattern))  # noqa: B023  # called at once
                matches = [RemoteFile(files.unstrip_protocol(name)) for name in names]
            else:
                _attempt(lambda: files.info(pattern), pattern)  # noqa: B023
                matches = [RemoteFile(files.unstrip_protocol(files._strip_protocol(pattern)))]  # as a glob gives it
        except FileNotFoundError:
            matches = []
        except OSError as error:
            raise InputError(f"{shown(pattern)!r} cannot be read: {error}") from error
        if not matches:
            raise InputError(f"expected files that {shown(pattern)!r} names, found none")
        found += matches
    return found


def shown(address: object) -> str:
    """An address as it may be printed: without a user, a password and a query."""
    text = str(address)
    scheme, mark, rest = text.partition("://")
    if not mark or not ADDRESS.match(text):
        return text
    host, slash, path = rest.partition("/")
    path = re.split(r"[?#]", path)[0] if scheme.lower() in ("http", "https") else path
    return f"{scheme}://{re.split(r'[?#]', host.rpartition('@')[2])[0]}{slash}{path}"


def _filesystem(address: str) -> Any:
    """Fsspec's file system of an address; it keeps one a process."""
    import fsspec

    scheme = address.partition("://")[0]
    try:
        return fsspec.filesystem(scheme)
    except ImportError as error:
        raise InputError(f"reading {scheme}:// needs a package that is not installed: {first_line(error)}") from error
    except Exception as error:  # of its package, for example without credentials
        raise InputError(f"reading {scheme}:// cannot begin: {type(error).__name__}") from error


def _attempt(read: Callable[[], T], where: object) -> T:
    """What a read gives, tried again after a pause; OSError without what the address hides.

    fsspec says of any failure of HTTP that there is no such file; only its cause tells which it was.
    """
    for number in range(TRIES):
        try:
            return read()
        except InputError:
            raise
        except PermissionError:
            raise PermissionError(f"reading {shown(where)} is not allowed with the credentials found") from None
        except Exception as error:  # of the network, or of the server's own client
            cause = error.__cause__ or error.__context__
            status = getattr(cause, "status", None)
            if isinstance(error, FileNotFoundError) and (cause is None or status in (404, 410)):
                raise FileNotFoundError(f"there is no {shown(where)}") from None
            reason = f"status {status}" if status else type(cause or error).__name__
            if number == TRIES - 1:
                raise OSError(f"{shown(where)} cannot be read after {TRIES} attempts ({reason})") from None
            time.sleep(PAUSE * 2**number)
    raise AssertionError  # pragma: no cover
