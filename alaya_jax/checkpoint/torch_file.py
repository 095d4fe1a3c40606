"""Reads tensors from PyTorch's zip files without PyTorch, and without running what they say.

Such a file holds a pickle, which is a program: unpickling it does whatever its author wanted. Here
its opcodes are read one by one; the few that a dictionary of tensors needs are understood as data,
and anything else is refused by name. No import, no call, no attribute is ever made for the file.
"""

import dataclasses
import math
import pickletools
import reprlib
import struct
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from alaya_jax.errors import CheckpointError

_AGAIN = "download or copy the file again"
_MAX_PICKLE = 1 << 26  # bytes; the largest Llama needs a few hundred thousand
_STORAGES = {
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
}
# What a damaged pickle or zip makes of the modules that parse them.
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
)


@dataclasses.dataclass(frozen=True)
class TorchTensor:
    """A tensor of a file: where its values lie.

    Attributes:
      data: the bytes of its storage from its first element on, uint8 view of the memory map.
      dtype: None when the type cannot be read.
      kind: PyTorch's name for the type.
      shape: of the tensor.
      strides: in elements.
    """

    data: np.ndarray
    dtype: np.dtype | None
    kind: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def values(self) -> np.ndarray:
        """The values; a view of the memory map."""
        assert self.dtype is not None
        flat = self.data[: self.data.size // self.dtype.itemsize * self.dtype.itemsize]
        steps = [step * self.dtype.itemsize for step in self.strides]
        return np.lib.stride_tricks.as_strided(
            flat.view(self.dtype), self.shape, steps, writeable=False
        )


@dataclasses.dataclass(frozen=True)
class _Global:
    """A name the pickle would import."""

    name: str


@dataclasses.dataclass(frozen=True)
class _Storage:
    kind: str
    key: str
    numel: int


@dataclasses.dataclass(frozen=True)
class _Rebuilt:
    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Refused(Exception):
    """What the file says is not understood; the message is the reason."""


_MARK = object()


def read_torch_file(path: Path) -> dict[str, TorchTensor]:
    """The tensors of a `.pth` file by name; no values are read.

    Raises:
      CheckpointError: it is no PyTorch zip file, is damaged, or holds anything but tensors.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = {info.filename: info for info in archive.infolist()}
            if len(members) != len(archive.infolist()):
                raise _Refused("a member occurs twice")
            pickles = [name for name in members if name.endswith("/data.pkl")]
            if len(pickles) != 1 or members[pickles[0]].file_size > _MAX_PICKLE:
                raise _Refused("it has no data.pkl, or one that is too large")
            if any(info.compress_type != zipfile.ZIP_STORED for info in members.values()):
                raise _Refused("it is compressed, which PyTorch never does")
            root = pickles[0].removesuffix("data.pkl")
            order = root + "byteorder"
            if order in members and archive.read(order).strip() != b"little":
                raise _Refused("it was written on a big-endian machine")
            tree = _interpret(archive.read(pickles[0]))
        mapped = np.memmap(path, np.uint8, "r").view(np.ndarray)
        if not isinstance(tree, dict):
            raise _Refused(f"it holds a {type(tree).__name__}, not a dictionary of tensors")
        return {_name(k): _locate(mapped, members, root, k, v) for k, v in tree.items()}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be opened ({error.strerror or error})") from error
    except zipfile.BadZipFile as error:
        raise CheckpointError(
            f"{path} is no PyTorch zip file, or is truncated ({error}); {_AGAIN}. Files of PyTorch "
            "before 1.6 have to be saved again by a newer one"
        ) from error
    except _Refused as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}); {_AGAIN}") from error


def _name(key: Any) -> str:
    if not isinstance(key, str):
        raise _Refused(f"a tensor is named {_short(key)}")
    return key


def _locate(
    mapped: np.ndarray,
    members: dict[str, zipfile.ZipInfo],
    root: str,
    name: str,
    tensor: Any,
) -> TorchTensor:
    if not isinstance(tensor, _Rebuilt):
        raise _Refused(f"{name!r} is no tensor but {_short(tensor)}")
    storage = tensor.storage
    info = members.get(f"{root}data/{storage.key}")
    if info is None:
        raise _Refused(f"the data of tensor {name!r} is missing; {_AGAIN}")
    if info.flag_bits & 1:
        raise _Refused(f"the data of tensor {name!r} is encrypted")
    at = info.header_offset
    signature, name_length, extra_length = struct.unpack_from("<4s22xHH", mapped[at : at + 30])
    begin = at + 30 + name_length + extra_length
    if signature != b"PK\x03\x04" or begin + info.file_size > mapped.size:
        raise _Refused(f"the data of tensor {name!r} goes past the end of the file; {_AGAIN}")
    dtype = _STORAGES.get(storage.kind)
    last = tensor.offset + sum(
        (n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True)
    )
    numbers = (tensor.offset, storage.numel, *tensor.shape, *tensor.strides)
    if any(n < 0 for n in numbers) or (math.prod(tensor.shape) and last >= storage.numel):
        raise _Refused(f"tensor {name!r} goes past the end of its data; {_AGAIN}")
    start = 0
    if dtype is not None:
        if storage.numel * dtype.itemsize > info.file_size:
            raise _Refused(f"the data of tensor {name!r} is too short; {_AGAIN}")
        start = tensor.offset * dtype.itemsize
    data = mapped[begin + start : begin + info.file_size]
    return TorchTensor(data, dtype, storage.kind, tensor.shape, tensor.strides)


def _interpret(program: bytes) -> Any:
    """What a pickle describes, by reading its opcodes as data."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    argument: Any

    def pop_mark() -> list[Any]:
        at = len(stack) - 1 - stack[::-1].index(_MARK)
        items = stack[at + 1 :]
        del stack[at:]
        return items

    for opcode, argument, _ in pickletools.genops(program):
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case (
                "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE"
                | "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "BINFLOAT"
            ):  # fmt: skip
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_Global(argument.replace(" ", ".")))
            case "STACK_GLOBAL":
                name, module = stack.pop(), stack.pop()
                stack.append(_Global(f"{module}.{name}"))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_describe(function, arguments))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                _set(stack[-1], [key, value])
            case "SETITEMS":
                items = pop_mark()
                _set(stack[-1], items)
            case "APPEND":
                value = stack.pop()
                _extend(stack[-1], [value])
            case "APPENDS":
                items = pop_mark()
                _extend(stack[-1], items)
            case "BUILD":  # attributes of a module's state dict: versions, not weights
                stack.pop()
                if not isinstance(stack[-1], dict):
                    raise _Refused("its pickle sets attributes of an object")
            case "STOP":
                return stack.pop()
            case name:
                raise _Refused(f"its pickle uses the instruction {name}, which no tensor needs")
    raise _Refused(f"its pickle has no end; {_AGAIN}")


def _short(value: Any) -> str:
    """What a value looks like, in bounded time: tuples of a pickle may nest without end."""
    return reprlib.repr(value)[:80]


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, list):
        raise _Refused("its pickle appends to something that is no list")
    target += items


def _set(target: Any, items: list[Any]) -> None:
    if not isinstance(target, dict):
        raise _Refused("its pickle sets items of something that is no dictionary")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not isinstance(key, str):
            raise _Refused(f"an entry is named {_short(key)}")
        if key in target:
            raise _Refused(f"tensor {_short(key)} occurs twice")
        target[key] = value


def _storage(identity: Any) -> _Storage:
    match identity:
        case ("storage", _Global(name), str(key), str(), int(numel)):
            return _Storage(name.removeprefix("torch."), key, numel)
    raise _Refused(f"its pickle refers to {_short(identity)}, which is no storage")


def _describe(function: Any, arguments: Any) -> Any:
    match function, arguments:
        case _Global("collections.OrderedDict"), ():
            return {}
        case _Global("torch._utils._rebuild_tensor_v2"), (
            _Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(strides),
            *_,
        ) if all(type(n) is int for n in shape + strides):
            return _Rebuilt(storage, offset, shape, strides)
        case _Global("torch._utils._rebuild_parameter"), (_Rebuilt() as tensor, *_):
            return tensor
        case _Global(name), _:
            raise _Refused(
                f"its pickle calls {name}, which is no tensor. It was not run. Get the weights as "
                "safetensors, or from a source you trust"
            )
    raise _Refused("its pickle calls something that is no function")
