"""ModelScope's hub, by its HTTP protocol: the list of a revision's files, and each file, from any byte on.

Its own client (modelscope-hub 0.5, Apache-2.0, whose requests these are) is not used: it tells the hub a lasting number of this
machine and the user's name, and unpickles what it keeps of a login. Here a request says what it asks for and nothing else; the
token, where MODELSCOPE_API_TOKEN gives one, goes to the hub itself and not to the hosts that it sends us on to.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import httpx
from filelock import FileLock, Timeout

from whitetuner.hub.source import Listing, NoSuchModelError, NotAllowedError, Say, UnreachableError, one_line

_REVISION = "master"
#: The hub cuts a longer list without saying so.
_MOST_FILES = 3000
_AT_ONCE, _TRIES, _REDIRECTS = 4, 3, 5
_PAUSE_S, _SAID_EVERY_S = 1.0, 10.0
_CHUNK = 1 << 20


class _TornError(Exception):
    """A file came in part; the part stays."""


class ModelScope:
    """As `whitetuner.hub.source.Hub`. Files lie where the hub's earlier clients keep them, and theirs are taken."""

    mirror = "MODELSCOPE_ENDPOINT=https://www.modelscope.ai"
    home = "MODELSCOPE_CACHE"
    login = "MODELSCOPE_API_TOKEN=..."

    def __init__(self) -> None:
        given = os.environ.get("MODELSCOPE_ENDPOINT", "").strip().rstrip("/") or "https://modelscope.cn"
        self.endpoint = given if "://" in given else f"https://{given}"
        token = os.environ.get("MODELSCOPE_API_TOKEN", "").strip()
        #: Older parts of the hub know the cookie, newer ones the header.
        self._login = {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}

    def listing(self, name: str) -> Listing:
        query = {"Revision": _REVISION, "Recursive": "True"}
        with _client() as client, self._opened(client, f"models/{name}/repo/files", query) as answer:
            files = _files(answer.read())
        digests = {path: str(one["Sha256"]).lower() for path, one in files.items() if one.get("Sha256")}
        return Listing(_REVISION, {path: int(one.get("Size") or 0) for path, one in files.items()}, digests)

    def place(self) -> Path:
        given = os.environ.get(self.home)
        return Path(given).expanduser() if given else Path.home() / ".cache" / "modelscope" / "hub"

    def folder(self, name: str) -> Path:
        """Earlier clients write a dot of a model's name as three low lines."""
        owner, _, model = name.partition("/")
        return self.place() / "models" / owner / model.replace(".", "___")

    def came(self, name: str) -> int:
        here = self.folder(name)
        return sum(one.stat().st_size for one in here.rglob("*") if one.is_file()) if here.is_dir() else 0

    def get(self, name: str, listing: Listing, files: Sequence[str], say: Say) -> Path:
        folder = self.folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        told, stop = _Told(name, sum(listing.sizes[one] for one in files), say), threading.Event()
        with _alone(folder, say), _client() as client, ThreadPoolExecutor(_AT_ONCE) as pool:
            try:
                got = [
                    pool.submit(self._get, client, name, listing, one, folder / one, told, stop)
                    for one in files
                ]
                for one in got:
                    one.result()
            finally:
                stop.set()  # where one failed, or the user ends it, the others end at their next piece
                pool.shutdown(cancel_futures=True)
        return folder

    def _get(
        self,
        client: httpx.Client,
        name: str,
        listing: Listing,
        file: str,
        target: Path,
        told: _Told,
        stop: threading.Event,
    ) -> None:
        """One file into its place, whole, by way of a file beside it that holds what came so far."""
        size, digest = listing.sizes[file], listing.digests.get(file)
        if target.is_file() and target.stat().st_size == size and digest in (None, _digest(target)):
            told.at(file, size)
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        query = {"Revision": listing.revision, "FilePath": file}
        for attempt in range(1, _TRIES + 1):
            try:
                for count in self._stream(client, f"models/{name}/repo", query, part, size):
                    told.at(file, count)
                    if stop.is_set():
                        return
                break
            except NoSuchModelError as error:
                raise UnreachableError(f"{file} is not there any more") from error
            except (_TornError, httpx.TransportError) as error:
                if attempt == _TRIES or stop.wait(_PAUSE_S * attempt):
                    raise UnreachableError(f"{file}: {one_line(error)}") from error
        if digest not in (None, _digest(part)):
            part.unlink()
            raise UnreachableError(f"{file} came with other contents than it has there")
        part.replace(target)

    def _stream(
        self, client: httpx.Client, path: str, query: Mapping[str, str], part: Path, size: int
    ) -> Iterator[int]:
        """Bytes in the part, as they come; what is in it already is not asked for again."""
        start = part.stat().st_size if part.is_file() else 0
        if start > size:
            part.unlink()
            start = 0
        if start == size and part.is_file():
            yield size
            return
        wanted = {"Range": f"bytes={start}-"} if start else {}
        with self._opened(client, path, query, wanted) as answer:
            goes_on = answer.status_code == httpx.codes.PARTIAL_CONTENT and answer.headers.get(
                "Content-Range", ""
            ).startswith(f"bytes {start}-")
            if answer.status_code != httpx.codes.OK and not goes_on:
                part.unlink(missing_ok=True)
                raise _TornError(f"the hub does not go on at byte {start}")
            count = start if goes_on else 0
            with part.open("ab" if goes_on else "wb") as out:
                for piece in answer.iter_bytes(_CHUNK):
                    out.write(piece)
                    count += len(piece)
                    yield count
        if count != size:
            raise _TornError(f"{count} of {size} bytes came")

    @contextmanager
    def _opened(
        self,
        client: httpx.Client,
        path: str,
        query: Mapping[str, str],
        wanted: Mapping[str, str] | None = None,
    ) -> Iterator[httpx.Response]:
        """An answer whose body is still to be read, after redirects; the token is told to the hub alone."""
        url = home = httpx.URL(f"{self.endpoint}/api/v1/{path}", params=dict(query))
        for _ in range(_REDIRECTS + 1):
            ours = (url.scheme, url.host, url.port) == (home.scheme, home.host, home.port)
            headers = {**(wanted or {}), **(self._login if ours else {})}
            answer = client.send(client.build_request("GET", url, headers=headers), stream=True)
            try:
                if answer.next_request is not None:
                    url = answer.next_request.url
                    continue
                if answer.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
                    raise NotAllowedError
                if answer.status_code == httpx.codes.NOT_FOUND:
                    raise NoSuchModelError
                if answer.is_error and answer.status_code != httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE:
                    raise UnreachableError(f"{url.host} answers {answer.status_code}")
                yield answer
                return
            finally:
                answer.close()
        raise UnreachableError(f"{home.host} sends on and on")


class _Told:
    """How far all files together are, said now and then."""

    def __init__(self, name: str, total: int, say: Say) -> None:
        self.name, self.total, self.say = name, total, say
        self._counts: dict[str, int] = {}
        self._lock, self._said_at = threading.Lock(), time.monotonic()

    def at(self, file: str, count: int) -> None:
        with self._lock:
            self._counts[file] = count
            if time.monotonic() - self._said_at < _SAID_EVERY_S:
                return
            self._said_at = time.monotonic()
            came = sum(self._counts.values())
            self.say(f"{self.name}: {came / 1e9:.2f} of {self.total / 1e9:.2f} GB are here")


@contextmanager
def _alone(folder: Path, say: Say) -> Iterator[None]:
    """While no other process fetches into this folder."""
    lock = FileLock(folder / ".fetching.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process fetches into {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _client() -> Iterator[httpx.Client]:
    """Its errors are those of whitetuner.hub.source."""
    try:
        client = httpx.Client(
            timeout=httpx.Timeout(30.0, connect=10.0),
            headers={"User-Agent": "whitetuner", "Accept-Encoding": "identity"},
        )
    except (ImportError, ValueError) as error:  # a proxy of the environment that it cannot use
        raise UnreachableError(one_line(error)) from error
    with client:
        try:
            yield client
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise UnreachableError(one_line(error)) from error


def _files(body: bytes) -> dict[str, Mapping[str, Any]]:
    """Path -> what the list says of it: Size, Sha256. Raises UnreachableError for what is no whole list of files."""
    try:
        rows = json.loads(body)["Data"]["Files"]
        found = {str(one["Path"]): one for one in rows if one.get("Type") != "tree"}
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise UnreachableError("its list of files cannot be read") from error
    if len(rows) >= _MOST_FILES:
        raise UnreachableError(f"it has {len(rows)} files or more, and the hub does not list them all")
    return {path: one for path, one in found.items() if _inside(path)}


def _inside(path: str) -> bool:
    """Whether a path stays in the folder that it is put into, on every system."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not any(part in ("/", "..") or set(part) & set('\\:*?"<>|\0') for part in parts)


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        found = hashlib.sha256()
        while piece := stream.read(8 * _CHUNK):
            found.update(piece)
    return found.hexdigest()
