"""Read a pickle as data: nothing in it is imported, called or allocated."""

import pickle
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar

from speculators_cli.core.torch_file.errors import TorchFileError
from speculators_cli.core.torch_file.tensor_spec import ITEM_BYTES, TensorSpec

# A sample has a few hundred operations; a table of token counts has two for each token.
MAX_OPERATIONS = 1_000_000
MAX_SIZE = 2**63 - 1
CACHED_BYTES = 8192  # of a pickle
MAX_DIMENSIONS = 8

STORAGE_DTYPES = {
    "torch.BFloat16Storage": "bfloat16",
    "torch.BoolStorage": "bool",
    "torch.ByteStorage": "uint8",
    "torch.CharStorage": "int8",
    "torch.DoubleStorage": "float64",
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.IntStorage": "int32",
    "torch.LongStorage": "int64",
    "torch.ShortStorage": "int16",
    "torch.storage.UntypedStorage": "uint8",
}
# Dtypes that torch saves as bytes, with the dtype as another argument.
UNTYPED_DTYPES = {
    f"torch.{name}": name for name in ("float8_e4m3fn", "float8_e5m2", "uint16", "uint32", "uint64")
}
OTHER_TENSORS = {
    "torch.serialization._get_layout": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data",
    "torch._utils._rebuild_parameter": "a module parameter",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
}


T = TypeVar("T")


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of bytes of the archive."""

    key: str
    dtype: str
    num_elements: int


def read_structure(pickled: bytes) -> object:
    """Describe what a pickle holds: plain values, lists, dicts, and a `TensorSpec` a tensor.

    What it returns may be given again, and is not to be changed.

    Raises:
        TorchFileError: It is damaged, or needs anything but tensors and plain values.
    """
    return _read_again(pickled) if len(pickled) <= CACHED_BYTES else _read(pickled)


def _read(pickled: bytes) -> object:
    try:
        return _Reader(pickled).read()
    except (ValueError, TypeError, LookupError, struct.error) as error:
        raise TorchFileError("has a damaged directory of tensors") from error


# Samples of one length have the very same pickle, so a scan of many reads most of them once.
_read_again = lru_cache(maxsize=4096)(_read)


class _Reader:
    """A pickle machine for the operations that `torch.save` writes, whose calls only describe."""

    def __init__(self, pickled: bytes) -> None:
        self.pickled = pickled
        self.position = 0
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def read(self) -> object:
        pickled, stack, memo = self.pickled, self.stack, self.memo
        for _ in range(MAX_OPERATIONS):
            code = pickled[self.position]
            self.position += 1
            # Three in four operations are one of these: a scan reads one pickle a sample.
            if code in _SMALL:
                argument = pickled[self.position]
                self.position += 1
                if code == _PUT:
                    memo[argument] = stack[-1]
                else:
                    stack.append(memo[argument] if code == _GET else argument)
            elif code in _CONSTANTS:
                stack.append(_CONSTANTS[code])
            elif code in _HANDLERS:
                _HANDLERS[code](self)
            elif code == pickle.STOP[0]:
                return self.stack.pop()
            else:
                raise TorchFileError(f"needs the pickle operation {code:#x}; only tensors are read")
        raise TorchFileError("holds too many objects to be a sample")

    def take_number(self, form: struct.Struct) -> Any:
        (number,) = form.unpack_from(self.pickled, self.position)
        self.position += form.size
        return number

    def take_bytes(self, length: struct.Struct) -> bytes:
        num_bytes = self.take_number(length)
        taken = self.pickled[self.position : self.position + num_bytes]
        if len(taken) != num_bytes:
            raise ValueError("cut")
        self.position += num_bytes
        return taken

    def take_line(self) -> str:
        end = self.pickled.index(b"\n", self.position)
        line = self.pickled[self.position : end].decode()
        self.position = end + 1
        return line

    def push_number(self, form: struct.Struct) -> None:
        self.stack.append(self.take_number(form))

    def push_text(self, length: struct.Struct) -> None:
        self.stack.append(self.take_bytes(length).decode(errors="surrogatepass"))

    def push_bytes(self, length: struct.Struct) -> None:
        self.stack.append(self.take_bytes(length))

    def push_long(self, length: struct.Struct) -> None:
        self.stack.append(int.from_bytes(self.take_bytes(length), "little", signed=True))

    def get(self, form: struct.Struct) -> None:
        self.stack.append(self.memo[self.take_number(form)])

    def put(self, form: struct.Struct) -> None:
        self.memo[self.take_number(form)] = self.stack[-1]

    def memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def push_list(self) -> None:
        self.stack.append([])

    def push_dict(self) -> None:
        self.stack.append({})

    def push_mark(self) -> None:
        self.stack.append(_MARK)

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def make_tuple(self) -> None:
        self.stack.append(tuple(self.pop_to_mark()))

    def make_tuple_of(self, num_items: int) -> None:
        items = tuple(self.stack[-num_items:])
        del self.stack[-num_items:]
        self.stack.append(items)

    def append(self) -> None:
        item = self.stack.pop()
        _expect(list, self.stack[-1]).append(item)

    def append_all(self) -> None:
        items = self.pop_to_mark()
        _expect(list, self.stack[-1]).extend(items)

    def set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _expect(dict, self.stack[-1])[_plain(key)] = value

    def set_items(self) -> None:
        items = self.pop_to_mark()
        keys = [_plain(key) for key in items[::2]]
        _expect(dict, self.stack[-1]).update(zip(keys, items[1::2], strict=True))

    def drop_state(self) -> None:
        """Ignore the metadata of a state dict: versions of modules."""
        self.stack.pop()
        _expect(dict, self.stack[-1])

    def push_global(self) -> None:
        module, name = self.take_line(), self.take_line()
        self.stack.append(Global(f"{module}.{name}"))

    def make_global(self) -> None:
        name, module = _expect(str, self.stack.pop()), _expect(str, self.stack.pop())
        self.stack.append(Global(f"{module}.{name}"))

    def make_storage(self) -> None:
        kind, storage_class, key, _, num_elements = _expect(tuple, self.stack.pop())
        if kind != "storage":
            raise ValueError("not a storage")
        name = _expect(Global, storage_class).name
        if name not in STORAGE_DTYPES:
            raise TorchFileError(f"holds a tensor of type `{_shown(name)}`")
        storage = Storage(_expect(str, key), STORAGE_DTYPES[name], _size(num_elements))
        self.stack.append(storage)

    def call(self) -> None:
        arguments, function = _expect(tuple, self.stack.pop()), self.stack.pop()
        name = function.name if isinstance(function, Global) else "an object"
        if name in OTHER_TENSORS:
            raise TorchFileError(f"holds {OTHER_TENSORS[name]}; only plain tensors are read")
        if name not in _CALLS:
            raise TorchFileError(f"would run `{_shown(name)}` when loaded; only tensors are read")
        self.stack.append(_CALLS[name](*arguments))


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *_: object
) -> TensorSpec:
    storage = _expect(Storage, storage)
    return _tensor_spec(storage, storage.dtype, storage.num_elements, offset, shape, stride)


def _rebuild_tensor_v3(
    storage: object,
    offset: object,
    shape: object,
    stride: object,
    requires_grad: object,  # noqa: ARG001 - the order is torch's
    hooks: object,  # noqa: ARG001
    dtype: object,
    *_: object,
) -> TensorSpec:
    storage, name = _expect(Storage, storage), _expect(Global, dtype).name
    if name not in UNTYPED_DTYPES:
        raise TorchFileError(f"holds a tensor of type `{_shown(name)}`")
    element = UNTYPED_DTYPES[name]
    num_elements = storage.num_elements // ITEM_BYTES[element]
    return _tensor_spec(storage, element, num_elements, offset, shape, stride)


def _tensor_spec(
    storage: Storage,
    dtype: str,
    num_elements: int,
    offset: object,
    shape: object,
    stride: object,
) -> TensorSpec:
    spec = TensorSpec(storage.key, dtype, _size(offset), _sizes(shape), _sizes(stride))
    claimed, held = spec.num_elements, num_elements - spec.offset
    if len(spec.shape) != len(spec.stride):
        raise ValueError("not a stride for each dimension")
    if claimed and max(claimed, spec.span) > held:
        raise TorchFileError(
            f"holds a tensor of {claimed * ITEM_BYTES[dtype]:,} bytes in a storage of "
            f"{max(held, 0) * ITEM_BYTES[dtype]:,} (expanded or cut)"
        )
    return spec


def _expect(kind: type[T], value: object) -> T:
    if not isinstance(value, kind):
        raise TypeError(f"not a {kind.__name__}")
    return value


def _size(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_SIZE:
        raise ValueError("not a size")
    return value


def _sizes(value: object) -> tuple[int, ...]:
    sizes = _expect(tuple, value)
    if len(sizes) > MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    return tuple(_size(size) for size in sizes)


def _plain(key: object) -> object:
    # A tuple nested deeply enough would overflow the stack when it is hashed.
    if not isinstance(key, str | int | float | bytes | None):
        raise TypeError("not a plain key")
    return key


def _shown(name: str) -> str:
    return name[:80].encode("unicode_escape").decode()


def _make_ordered_dict(*items: object) -> dict[object, object]:
    if items:
        raise ValueError("not an empty dict")
    return {}


def _make_counter(*items: object) -> dict[object, object]:
    """Read a `collections.Counter` as a dict."""
    (content,) = items or ({},)
    return _expect(dict, content)


def _make_size(sizes: object) -> tuple[int, ...]:
    return _sizes(sizes)


_MARK = object()
_U8, _U16, _U32, _U64 = (struct.Struct(f"<{form}") for form in "BHIQ")
_I32, _F64 = struct.Struct("<i"), struct.Struct(">d")
_CALLS: dict[str, Callable[..., object]] = {
    "collections.Counter": _make_counter,
    "collections.OrderedDict": _make_ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch.Size": _make_size,
}
_PUT, _GET = pickle.BINPUT[0], pickle.BINGET[0]
_SMALL = {_PUT, _GET, pickle.BININT1[0]}  # have one byte as argument
_CONSTANTS = {
    pickle.NONE[0]: None,
    pickle.NEWTRUE[0]: True,
    pickle.NEWFALSE[0]: False,
    pickle.EMPTY_TUPLE[0]: (),
}
_HANDLERS: dict[int, Callable[[_Reader], object]] = {
    pickle.APPEND[0]: _Reader.append,
    pickle.APPENDS[0]: _Reader.append_all,
    pickle.BINBYTES[0]: lambda reader: reader.push_bytes(_U32),
    pickle.BINBYTES8[0]: lambda reader: reader.push_bytes(_U64),
    pickle.BINFLOAT[0]: lambda reader: reader.push_number(_F64),
    pickle.BININT[0]: lambda reader: reader.push_number(_I32),
    pickle.BININT2[0]: lambda reader: reader.push_number(_U16),
    pickle.BINPERSID[0]: _Reader.make_storage,
    pickle.BINUNICODE[0]: lambda reader: reader.push_text(_U32),
    pickle.BINUNICODE8[0]: lambda reader: reader.push_text(_U64),
    pickle.BUILD[0]: _Reader.drop_state,
    pickle.EMPTY_DICT[0]: _Reader.push_dict,
    pickle.EMPTY_LIST[0]: _Reader.push_list,
    pickle.FRAME[0]: lambda reader: reader.take_number(_U64),
    pickle.GLOBAL[0]: _Reader.push_global,
    pickle.LONG1[0]: lambda reader: reader.push_long(_U8),
    pickle.LONG4[0]: lambda reader: reader.push_long(_U32),
    pickle.LONG_BINGET[0]: lambda reader: reader.get(_U32),
    pickle.LONG_BINPUT[0]: lambda reader: reader.put(_U32),
    pickle.MARK[0]: _Reader.push_mark,
    pickle.MEMOIZE[0]: _Reader.memoize,
    pickle.PROTO[0]: lambda reader: reader.take_number(_U8),
    pickle.REDUCE[0]: _Reader.call,
    pickle.SETITEM[0]: _Reader.set_item,
    pickle.SETITEMS[0]: _Reader.set_items,
    pickle.SHORT_BINBYTES[0]: lambda reader: reader.push_bytes(_U8),
    pickle.SHORT_BINUNICODE[0]: lambda reader: reader.push_text(_U8),
    pickle.STACK_GLOBAL[0]: _Reader.make_global,
    pickle.TUPLE[0]: _Reader.make_tuple,
    pickle.TUPLE1[0]: lambda reader: reader.make_tuple_of(1),
    pickle.TUPLE2[0]: lambda reader: reader.make_tuple_of(2),
    pickle.TUPLE3[0]: lambda reader: reader.make_tuple_of(3),
}
