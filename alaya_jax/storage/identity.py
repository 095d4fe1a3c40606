"""Names: an encoding in which no two values look alike, and the digest of it."""

import hashlib
from typing import Any


def encoded(value: Any) -> bytes:
    """A string, a whole number, or a tuple of such, as bytes that no other value has.

    Each value begins with its type and its length, so that what stands beside it cannot run into
    it: ("org_1", "2345") is not ("org_12345", "").
    """
    if isinstance(value, str):
        kind, data = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, int):
        kind, data = b"i", str(int(value)).encode()
    else:
        kind, data = b"t", b"".join(map(encoded, value))
    return kind + len(data).to_bytes(8, "little") + data


def digest(*parts: bytes) -> str:
    """24 hexadecimal digits that name these bytes, each part framed by its length."""
    hashed = hashlib.blake2b(digest_size=12)
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest()
