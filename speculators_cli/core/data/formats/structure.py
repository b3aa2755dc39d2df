"""What a pickle says, read as data: nothing it names is imported, called or allocated."""

import pickletools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod

import torch

from speculators_cli.core.data.sample import BadSampleError

# A sample has a few hundred operations; text beside the tensors counts as one.
MAX_OPERATIONS = 200_000
MAX_INT = 2**63 - 1
MAX_DIMENSIONS = 8

STORAGE_DTYPES = {
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.BoolStorage": torch.bool,
    "torch.ByteStorage": torch.uint8,
    "torch.CharStorage": torch.int8,
    "torch.DoubleStorage": torch.float64,
    "torch.FloatStorage": torch.float32,
    "torch.HalfStorage": torch.float16,
    "torch.IntStorage": torch.int32,
    "torch.LongStorage": torch.int64,
    "torch.ShortStorage": torch.int16,
    "torch.storage.UntypedStorage": torch.uint8,
}
# Types that torch saves as bytes with the dtype beside them.
UNTYPED_DTYPES = {
    "torch.float8_e4m3fn": torch.float8_e4m3fn,
    "torch.float8_e5m2": torch.float8_e5m2,
    "torch.uint16": torch.uint16,
    "torch.uint32": torch.uint32,
    "torch.uint64": torch.uint64,
}
OTHER_TENSORS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantised tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data",
    "torch._utils._rebuild_parameter": "a module parameter",
    "torch._tensor._rebuild_from_type_v2": "a tensor subclass",
}


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import."""

    name: str


@dataclass(frozen=True)
class Storage:
    """A block of bytes of the archive."""

    key: str
    dtype: torch.dtype
    num_elements: int


@dataclass(frozen=True)
class TensorSpec:
    """A tensor as the pickle describes it: a strided view of a storage. Sizes are in elements."""

    storage_key: str
    dtype: torch.dtype
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Elements of the tensor, as its shape claims."""
        return prod(self.shape)

    @property
    def span(self) -> int:
        """Elements of the storage from the tensor's first to its last."""
        if self.num_elements == 0:
            return 0
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def columns(self, start: int, stop: int) -> "TensorSpec":
        """Columns of a matrix, as a view."""
        rows = self.shape[0]
        offset = self.offset + start * self.stride[1]
        shape = (rows, stop - start)
        return TensorSpec(self.storage_key, self.dtype, offset, shape, self.stride)

    def without_batch(self) -> "TensorSpec":
        """The same without leading dimensions of 1, which some generators leave in place."""
        shape, stride = self.shape, self.stride
        while len(shape) > 1 and shape[0] == 1:
            shape, stride = shape[1:], stride[1:]
        return TensorSpec(self.storage_key, self.dtype, self.offset, shape, stride)


def read_structure(pickled: bytes) -> object:
    """Describe what a pickle holds: plain values, lists, dicts, and a `TensorSpec` a tensor.

    Raises:
        BadSampleError: It is damaged, or needs anything but tensors and plain values.
    """
    try:
        return _Reader().read(pickled)
    except (ValueError, TypeError, IndexError, KeyError, AttributeError, OverflowError) as error:
        raise BadSampleError("has a damaged directory of tensors") from error


class _Mark:
    pass


class _Reader:
    """A pickle machine for the operations that `torch.save` writes, whose calls only describe."""

    def __init__(self) -> None:
        self.stack: list[object] = []
        self.memo: dict[int, object] = {}

    def read(self, pickled: bytes) -> object:
        for name, argument in _operations(pickled):
            if name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in _PUSHES_ARGUMENT:
                self.stack.append(argument)
            elif name == "STOP":
                return self.stack.pop()
            elif name in _HANDLERS:
                _HANDLERS[name](self, argument)
            else:
                raise BadSampleError(f"needs the pickle operation `{name}`; only tensors are read")
        raise ValueError("no end")

    def get(self, argument: object) -> None:
        self.stack.append(self.memo[_int(argument)])

    def put(self, argument: object) -> None:
        self.memo[_int(argument)] = self.stack[-1]

    def memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def empty_list(self, _: object) -> None:
        self.stack.append([])

    def empty_dict(self, _: object) -> None:
        self.stack.append({})

    def mark(self, _: object) -> None:
        self.stack.append(_Mark())

    def pop_to_mark(self) -> list[object]:
        items: list[object] = []
        while not isinstance(item := self.stack.pop(), _Mark):
            items.append(item)
        return items[::-1]

    def tuple_of(self, num_items: int) -> None:
        items = tuple(self.stack[len(self.stack) - num_items :])
        del self.stack[len(self.stack) - num_items :]
        self.stack.append(items)

    def append(self, _: object) -> None:
        item = self.stack.pop()
        _list(self.stack[-1]).append(item)

    def appends(self, _: object) -> None:
        items = self.pop_to_mark()
        _list(self.stack[-1]).extend(items)

    def set_item(self, _: object) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        _dict(self.stack[-1])[_plain(key)] = value

    def set_items(self, _: object) -> None:
        items = self.pop_to_mark()
        keys = [_plain(key) for key in items[::2]]
        _dict(self.stack[-1]).update(zip(keys, items[1::2], strict=True))

    def find_global(self, argument: object) -> None:
        self.stack.append(Global(_text(argument).replace(" ", ".")))

    def find_stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(Global(f"{_text(module)}.{_text(name)}"))

    def find_storage(self, _: object) -> None:
        kind, storage_class, key, _, num_elements = _tuple(self.stack.pop())
        if kind != "storage" or not isinstance(storage_class, Global):
            raise ValueError("not a storage")
        if storage_class.name not in STORAGE_DTYPES:
            raise BadSampleError(f"holds a tensor of type `{_shown(storage_class.name)}`")
        dtype = STORAGE_DTYPES[storage_class.name]
        self.stack.append(Storage(_text(key), dtype, _int(num_elements)))

    def reduce(self, _: object) -> None:
        arguments, function = _tuple(self.stack.pop()), self.stack.pop()
        name = function.name if isinstance(function, Global) else "an object"
        if name in OTHER_TENSORS:
            raise BadSampleError(f"holds {OTHER_TENSORS[name]}; only plain tensors are read")
        if name not in _CALLS:
            raise BadSampleError(f"would run `{_shown(name)}` when loaded; only tensors are read")
        self.stack.append(_CALLS[name](*arguments))


def _rebuild_tensor(
    storage: object, offset: object, shape: object, stride: object, *_: object
) -> TensorSpec:
    if not isinstance(storage, Storage):
        raise TypeError("not a storage")
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
    if not isinstance(storage, Storage) or not isinstance(dtype, Global):
        raise TypeError("not a storage with its type")
    if dtype.name not in UNTYPED_DTYPES:
        raise BadSampleError(f"holds a tensor of type `{_shown(dtype.name)}`")
    element = UNTYPED_DTYPES[dtype.name]
    num_elements = storage.num_elements // element.itemsize
    return _tensor_spec(storage, element, num_elements, offset, shape, stride)


def _tensor_spec(
    storage: Storage,
    dtype: torch.dtype,
    num_elements: int,
    offset: object,
    shape: object,
    stride: object,
) -> TensorSpec:
    spec = TensorSpec(storage.key, dtype, _int(offset), _ints(shape), _ints(stride))
    claimed, held = spec.num_elements, num_elements - spec.offset
    if claimed > held or spec.span > held:
        raise BadSampleError(
            f"holds a tensor of {claimed * dtype.itemsize:,} bytes in a storage of "
            f"{max(held, 0) * dtype.itemsize:,} (expanded or cut)"
        )
    return spec


def _operations(pickled: bytes) -> Iterator[tuple[str, object]]:
    for index, (operation, argument, _) in enumerate(pickletools.genops(pickled)):
        if index > MAX_OPERATIONS:
            raise BadSampleError("holds too many objects to be a sample")
        yield operation.name, argument


def _int(value: object) -> int:
    if not isinstance(value, int) or not 0 <= value <= MAX_INT:
        raise ValueError("not a size")
    return value


def _ints(value: object) -> tuple[int, ...]:
    sizes = _tuple(value)
    if len(sizes) > MAX_DIMENSIONS:
        raise ValueError("too many dimensions")
    return tuple(_int(size) for size in sizes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError("not text")
    return value


def _plain(key: object) -> object:
    # A tuple nested deeply enough would overflow the stack when it is hashed.
    if not isinstance(key, str | int | float | bytes | None):
        raise TypeError("not a plain key")
    return key


def _shown(name: str) -> str:
    return name[:80].encode("unicode_escape").decode()


def _tuple(value: object) -> tuple[object, ...]:
    if not isinstance(value, tuple):
        raise TypeError("not a tuple")
    return value


def _list(value: object) -> list[object]:
    if not isinstance(value, list):
        raise TypeError("not a list")
    return value


def _dict(value: object) -> dict[object, object]:
    if not isinstance(value, dict):
        raise TypeError("not a dict")
    return value


def _ordered_dict(*items: object) -> dict[object, object]:
    if items:
        raise ValueError("not an empty dict")
    return {}


_CALLS: dict[str, Callable[..., object]] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch.Size": _tuple,
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSHES_ARGUMENT = {
    "BINBYTES",
    "BINBYTES8",
    "BINFLOAT",
    "BININT",
    "BININT1",
    "BININT2",
    "BINSTRING",
    "BINUNICODE",
    "BINUNICODE8",
    "LONG1",
    "LONG4",
    "SHORT_BINBYTES",
    "SHORT_BINSTRING",
    "SHORT_BINUNICODE",
}
_HANDLERS: dict[str, Callable[[_Reader, object], None]] = {
    "APPEND": _Reader.append,
    "APPENDS": _Reader.appends,
    "BINGET": _Reader.get,
    "BINPERSID": _Reader.find_storage,
    "BINPUT": _Reader.put,
    "EMPTY_DICT": _Reader.empty_dict,
    "EMPTY_LIST": _Reader.empty_list,
    "FRAME": lambda reader, _: None,  # noqa: ARG005
    "GLOBAL": _Reader.find_global,
    "LONG_BINGET": _Reader.get,
    "LONG_BINPUT": _Reader.put,
    "MARK": _Reader.mark,
    "MEMOIZE": _Reader.memoize,
    "PROTO": lambda reader, _: None,  # noqa: ARG005
    "REDUCE": _Reader.reduce,
    "SETITEM": _Reader.set_item,
    "SETITEMS": _Reader.set_items,
    "STACK_GLOBAL": _Reader.find_stack_global,
    "TUPLE": lambda reader, _: reader.stack.append(tuple(reader.pop_to_mark())),
    "TUPLE1": lambda reader, _: reader.tuple_of(1),
    "TUPLE2": lambda reader, _: reader.tuple_of(2),
    "TUPLE3": lambda reader, _: reader.tuple_of(3),
}
