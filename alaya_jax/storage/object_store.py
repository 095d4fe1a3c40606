"""Where objects are: what is asked of such a place, and a shared one that is named by a URL.

An object is written once, under a name that nobody writes anything else under.
"""

import functools
import os
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol
from urllib.parse import urlsplit

from alaya_jax.errors import RemoteError, RequestError

SCHEMES = ("file", "memory", "s3", "gs")
"""What a URL may begin with."""

TIMEOUT = "ALAYA_REMOTE_TIMEOUT"
"""The variable that says how many seconds one request may take."""

_SECONDS = 60.0
_CREDENTIALS = {
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (AWS_SESSION_TOKEN, AWS_REGION and, for a "
    "server of another maker, AWS_ENDPOINT_URL)",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS",
}


_DENIED = ("permission", "denied", "forbidden", "http_response_code='403'")


class Found(NamedTuple):
    """An object that was read."""

    data: bytes
    version: bytes
    """What `replace` wants to know."""


class ObjectStore(Protocol):
    """A place for objects. Threads may share it."""

    @property
    def where(self) -> str:
        """A URL or a path, for errors."""
        ...

    def read(self, key: str) -> Found | None:
        """The object, or None where there is none. Raises RemoteError."""
        ...

    def begins(self, key: str, count: int) -> bytes | None:
        """The first bytes of an object, fewer of a shorter one; None where there is none."""
        ...

    def put(self, key: str, data: bytes) -> bool:
        """Writes an object unless there is one; whether it did. Raises RemoteError."""
        ...

    def replace(self, key: str, data: bytes, version: bytes) -> bool:
        """Writes over an object unless it is another one by now; whether it did."""
        ...

    def keys(self, prefix: str) -> list[str]:
        """The names of all objects that begin so, in order. Raises RemoteError."""
        ...


def damaged(place: ObjectStore, key: str, what: str) -> str:
    """What is wrong with an object, and the way out."""
    return (
        f"{place.where}: {key}: {what}; push its context again from a database that has it "
        f"(alaya db push --repair {place.where} ID)"
    )


class SharedStore:
    """An `ObjectStore` behind a URL, through tensorstore.

    What is written is there whole or not at all, and of two that write one name the first wins.
    Credentials are those of the environment; for GCS, those that gcloud keeps count too.

    Args:
      url: `file:///shared/directory/`, `s3://bucket/path/`, `gs://bucket/path/`, or, within one
        process, `memory://name/`.

    Raises:
      RequestError: the URL is of another kind, or not understood.
    """

    def __init__(self, url: str):
        import tensorstore as ts

        self.where = self._url = url
        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES or "|" in url:  # which would add a layer, such as zip
            known = ", ".join(f"{s}://" for s in SCHEMES)
            raise RequestError(f"remote {url!r}: a shared store has a URL that begins with {known}")
        self._scheme = scheme
        self._seconds = _timeout()
        try:
            asked = ts.KvStore.Spec(url if url.endswith("/") else f"{url}/").to_json()
            assert isinstance(asked, dict)
            spec = asked | _options(scheme, os.environ)
            context = _in_this_process() if scheme == "memory" else ts.Context(_RETRIES)
            self._kv: Any = ts.KvStore.open(spec, context=context).result(timeout=self._seconds)
        except (ValueError, TimeoutError) as error:
            raise RequestError(f"remote {url!r}: {error}") from error

    def __repr__(self) -> str:
        return f"SharedStore({self._url!r})"

    def read(self, key: str) -> Found | None:
        """See `ObjectStore.read`."""
        found = self._wait(self._kv.read(key), f"reading {key}")
        return None if found.state == "missing" else Found(found.value, found.stamp.generation)

    def begins(self, key: str, count: int) -> bytes | None:
        """See `ObjectStore.begins`."""
        try:
            future = self._kv.read(key, byte_range=slice(0, count))
            found = self._wait(future, f"reading {key}")
        except RemoteError as error:
            if "OUT_OF_RANGE" not in str(error.__cause__):
                raise
            whole = self.read(key)
            return None if whole is None else whole.data[:count]
        return None if found.state == "missing" else found.value

    def put(self, key: str, data: bytes) -> bool:
        """See `ObjectStore.put`."""
        if self.replace(key, data, self._absent):
            return True
        if self.begins(key, 0) is None:  # so it is said where there is no bucket to write to
            raise RemoteError(self._reason(f"writing {key}", "NoSuchBucket"))
        return False

    @functools.cached_property
    def _absent(self) -> bytes:
        """tensorstore's version of what is not there, which it has no name for."""
        return self._wait(self._kv.read("absent"), "reading").stamp.generation

    def replace(self, key: str, data: bytes, version: bytes) -> bool:
        """See `ObjectStore.replace`."""
        try:
            stamp = self._wait(self._kv.write(key, data, if_equal=version), f"writing {key}")
        except RemoteError as error:
            if "Malformed StorageGeneration" not in str(error):
                raise
            # Some servers say of no object which version it is. An object is replaced by what its
            # name says, so that of two who do it at once either may be the last.
            stamp = self._wait(self._kv.write(key, data), f"writing {key}")
        return stamp.generation != b""  # else the condition did not hold

    def keys(self, prefix: str) -> list[str]:
        """See `ObjectStore.keys`."""
        import tensorstore as ts

        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        asked = self._kv.list(ts.KvStore.KeyRange(prefix, end))
        found = self._wait(asked, f"listing {prefix}")
        names = (key.decode("utf-8", "replace") for key in found)
        return sorted(name for name in names if name.startswith(prefix))  # some servers list more

    def _wait(self, future: Any, what: str) -> Any:
        """The result, or an error that says what to do."""
        try:
            return future.result(timeout=self._seconds)
        except TimeoutError as error:
            raise RemoteError(
                f"{self._url}: {what} took longer than {self._seconds:g} s; see that it can be "
                f"reached{self._endpoint_told()}, or raise {TIMEOUT}"
            ) from error
        except (ValueError, OSError) as error:
            raise RemoteError(self._reason(what, str(error))) from error

    def _reason(self, what: str, said: str) -> str:
        lowered = said.lower()
        variables = _CREDENTIALS.get(self._scheme)
        if variables and "credential" in lowered:
            way_out = f"set {variables} in the environment"
        elif any(word in lowered for word in _DENIED):
            way_out = "reading and writing must be allowed there"
            way_out += f" to what {variables} say" if variables else ""
        elif "nosuchbucket" in lowered:
            way_out = "there is no such bucket; make it, or mend the URL"
        elif self._scheme == "file":
            way_out = "give the URL of a directory that can be read and written"
        else:
            way_out = f"see that it can be reached{self._endpoint_told()}"
        return f"{self._url}: {what} failed; {way_out} ({said[:300]})"

    def _endpoint_told(self) -> str:
        endpoint = _endpoint(os.environ) if self._scheme == "s3" else None
        return f" ({endpoint}, from AWS_ENDPOINT_URL)" if endpoint else ""


_RETRIES = {
    f"{kind}_request_retries": {"max_retries": 3, "initial_delay": "200ms", "max_delay": "2s"}
    for kind in ("s3", "gcs")
}


def _options(scheme: str, environment: Mapping[str, str]) -> dict[str, Any]:
    """What a URL does not say."""
    if scheme != "s3":
        return {}
    # Two writers of one name: by the server's own condition, not by a look beforehand.
    options: dict[str, Any] = {
        "use_conditional_write": True,
        "aws_credentials": {"type": "environment"},
    }
    region = environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION")
    if endpoint := _endpoint(environment):
        options["endpoint"] = endpoint
        region = region or "us-east-1"  # which other servers take, and cannot be asked for
    return options | ({"aws_region": region} if region else {})


def _endpoint(environment: Mapping[str, str]) -> str | None:
    return environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL")


def _timeout() -> float:
    text = os.environ.get(TIMEOUT, "")
    try:
        seconds = float(text or _SECONDS)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise RequestError(f"{TIMEOUT}={text!r}: give seconds, above 0")
    return seconds


_memory: Any = None


def _in_this_process() -> Any:
    """What `memory://` shares in a process: all who open it find the same objects."""
    import tensorstore as ts

    global _memory
    if _memory is None:
        _memory = ts.Context()
    return _memory
