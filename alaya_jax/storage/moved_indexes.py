"""The indexes of contexts in an object store.

    pieces/<2 letters>/<SHA-256>        up to 32 MiB of an array of one layer, named by their bytes
    indexes/<group>/<context>/<kind>    settings, and of each layer's arrays dtype, shape and pieces

The second is written last. One of a kind is kept for each context: the newest that was pushed.
"""

import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from alaya_jax.errors import ContextError
from alaya_jax.storage import objects
from alaya_jax.storage.interface import ContextRecord, ContextStore
from alaya_jax.storage.object_store import ObjectStore

PIECE = 32 << 20
"""Bytes of an array that are one object."""

_MARK = b"alaya index 1\n"
_KINDS = "buif"  # bool, integers, floats: never objects
_LAYERS, _ARRAYS, _PIECES = 1024, 64, 1 << 16


def push(
    place: ObjectStore, store: ContextStore, record: ContextRecord, *, repair: bool = False
) -> list[str]:
    """Writes the indexes of a context that are not there as they are built here; their kinds.

    Damaged ones stay where they are.

    Args:
      place: where to.
      store, record: where from, and whose.
      repair: read what is there, and write anew what is damaged or gone.
    """
    written = []
    assert record.header is not None
    for kind, index in store.indexes(record.id).items():
        key = _key(objects.group(record.header), record.id, kind)
        there = place.read(key)
        same = there is not None and _settings(there.data) == dict(index.settings)
        if index.problem is not None or (same and not repair):
            continue
        layers = [
            _push_layer(place, store.read_index(record.id, kind, layer), repair)
            for layer in range(record.header.num_layers)
        ]
        fields = {"context": record.id, "kind": kind, "settings": dict(index.settings)}
        data = objects.write_plain(_MARK, fields | {"layers": layers})
        if there is None:
            place.put(key, data)
        elif there.data != data:
            place.replace(key, data, there.version)
        written.append(kind)
    return written


def pull(place: ObjectStore, store: ContextStore, id: str, group: str) -> list[str]:
    """Takes the indexes that a database's context does not have, undamaged; their kinds.

    Raises:
      ContextError, RemoteError: an index is damaged, or a piece of it is gone.
    """
    prefix, taken, here = _key(group, id, ""), [], store.indexes(id)
    for key in place.keys(prefix):
        kind = key.removeprefix(prefix)
        if kind in here and here[kind].problem is None:
            continue
        found = place.read(key)
        try:
            if found is None:
                raise ContextError("it is gone")
            fields = objects.read_plain(found.data, _MARK)
            settings, layers = _checked(fields, id, kind)
        except ContextError as error:
            raise ContextError(f"{place.where}: {key}: {error}; {_WAY_OUT}") from error
        store.write_index(id, kind, settings, _layers(place, key, layers))
        taken.append(kind)
    return taken


_WAY_OUT = "build the index again (alaya db index), and push it"


def _key(group: str, id: str, kind: str) -> str:
    return f"indexes/{group}/{id}/{kind}"


def _settings(data: bytes) -> Any:
    try:
        return objects.read_plain(data, _MARK).get("settings")
    except ContextError:
        return None


def _push_layer(
    place: ObjectStore, arrays: Mapping[str, np.ndarray], repair: bool
) -> dict[str, Any]:
    layer = {}
    for name, array in arrays.items():
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        raw = little.reshape(-1).view(np.uint8)
        pieces = []
        for first in range(0, max(1, len(raw)), PIECE):
            data = raw[first : first + PIECE].tobytes()
            pieces.append(hashlib.sha256(data).hexdigest())
            key = _piece_key(pieces[-1])
            if place.begins(key, 0) is None:
                place.put(key, data)
            elif repair and (there := place.read(key)) is not None and there.data != data:
                place.replace(key, data, there.version)
        layer[name] = {"dtype": little.dtype.str, "shape": list(array.shape), "pieces": pieces}
    return layer


def _piece_key(name: str) -> str:
    return f"pieces/{name[:2]}/{name}"


def _checked(fields: Mapping[str, Any], id: str, kind: str) -> tuple[dict[str, Any], list[Any]]:
    """Settings and layers of an index, if it is understood and of this context."""
    try:
        if (fields["context"], fields["kind"]) != (id, kind) or not kind.isalpha():
            raise ContextError("it is of another context or kind")
        settings, layers = dict(fields["settings"]), fields["layers"]
        if not (isinstance(layers, list) and 0 < len(layers) <= _LAYERS):
            raise ValueError("layers")
        for layer in layers:
            if not 0 < len(layer) <= _ARRAYS:
                raise ValueError("arrays")
            for name, array in layer.items():
                dtype, shape = np.dtype(array["dtype"]), array["shape"]
                plain = dtype.kind in _KINDS
                counts = all(type(n) is int and 0 <= n < 1 << 40 for n in shape)
                if not (name.isidentifier() and plain and counts and len(shape) <= 8):
                    raise ValueError(f"array {name!r}")
                size = dtype.itemsize
                for n in shape:
                    size *= n
                if len(array["pieces"]) != max(1, -(-size // PIECE)) or size > PIECE * _PIECES:
                    raise ValueError(f"pieces of {name!r}")
                if not all(map(objects.is_name, array["pieces"])):
                    raise ValueError(f"names of pieces of {name!r}")
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ContextError(f"it cannot be understood ({error})") from error
    return settings, layers


def _layers(place: ObjectStore, key: str, layers: list[Any]) -> Iterator[dict[str, np.ndarray]]:
    for layer in layers:
        yield {name: _array(place, key, **array) for name, array in layer.items()}


def _array(place: ObjectStore, key: str, dtype: str, shape: list[int], pieces: Any) -> np.ndarray:
    size = np.dtype(dtype).itemsize * int(np.prod(shape, dtype=object))
    parts, held = [], 0
    for name in pieces:
        found = place.read(_piece_key(name))
        if found is None:
            raise ContextError(f"{place.where}: {_piece_key(name)} is gone; {_WAY_OUT}")
        if hashlib.sha256(found.data).hexdigest() != name or held + len(found.data) > size:
            raise ContextError(f"{place.where}: {_piece_key(name)} is damaged; {_WAY_OUT}")
        parts.append(found.data)
        held += len(found.data)
    if held != size:
        raise ContextError(f"{place.where}: {key}: it has {held} bytes, not {size}; {_WAY_OUT}")
    return np.frombuffer(b"".join(parts), dtype).reshape(shape)
