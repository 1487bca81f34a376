"""Look through a checkpoint's pickle before torch reads it, making nothing of what it describes (no torch).

`torch.load(weights_only=True)` runs no code of a stranger's, but it calls what is on its own list, with the file's
arguments: some of these calls take any amount of memory, and hashing a nested tuple of a hundred bytes takes hours. A
state dict needs few of them. This walks the opcodes as torch's unpickler would, on a stack of descriptions, and refuses
every call, class, attribute and key that a state dict does not need.
"""

from __future__ import annotations

import pickletools
import re
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

_MAX_OPCODES = 2_000_000  # 60 times what the largest teachers have; looked through in seconds
_MAX_NAME = 100


class UnsafeGlobalError(ValueError):
    """The pickle wants something that a state dict does not need.

    Attributes:
        name: `module.name`.
    """

    def __init__(self, name: str) -> None:
        super().__init__(f"it wants {name}")
        self.name = name


@dataclass(frozen=True)
class _Global:
    name: str


@dataclass(frozen=True)
class _Made:
    """What a call gives."""

    by: str


@dataclass(frozen=True)
class _Storage:
    """The memory of tensors, which holds so many numbers."""

    count: int


_DICT = _Made("a dictionary")
_PLAIN = (str, bytes, int, float, type(None))  # bool is an int

Arguments = tuple[Any, ...]


def _anything(_arguments: Arguments) -> bool:
    return True


def _plain(arguments: Arguments) -> bool:
    return all(isinstance(value, _PLAIN) for value in arguments)


def _items(arguments: Arguments) -> bool:
    """Nothing, a dictionary, or a list of [key, value], as Python 2 wrote them."""
    if len(arguments) != 1 or not isinstance(arguments[0], list):
        return arguments in ((), (_DICT,))
    pairs = arguments[0]
    return all(isinstance(p, (list, tuple)) and len(p) == 2 and isinstance(p[0], _PLAIN) for p in pairs)


def _within_storage(arguments: Arguments) -> bool:
    """A storage, an offset, sizes and strides: torch gives a storage that is too small for them what it lacks."""
    storage, offset, sizes, strides = arguments[:4]
    if not isinstance(storage, _Storage) or not isinstance(sizes, tuple) or not isinstance(strides, tuple):
        return False
    numbers = (offset, *sizes, *strides)
    if len(sizes) != len(strides) or not all(isinstance(n, int) and n >= 0 for n in numbers):
        return False
    last = sum((size - 1) * stride for size, stride in zip(sizes, strides, strict=True))
    return 0 in sizes or offset + last < storage.count


def _one_flat_list(arguments: Arguments) -> bool:
    return len(arguments) == 1 and isinstance(arguments[0], (list, tuple)) and _plain(tuple(arguments[0]))


def _latin1(arguments: Arguments) -> bool:
    """How protocol 2 writes bytes; other codecs can take the square of the text's length."""
    return len(arguments) == 2 and isinstance(arguments[0], str) and arguments[1] in ("latin1", "latin-1")


_ORDERED, _NUMPY_TYPE = "collections.OrderedDict", "numpy.dtype"
_CALLS: dict[str, Callable[[Arguments], bool]] = {
    _ORDERED: _items,
    "collections.Counter": _items,
    "torch._utils._rebuild_tensor": _within_storage,
    "torch._utils._rebuild_tensor_v2": _within_storage,
    "torch._utils._rebuild_tensor_v3": _within_storage,
    "torch._utils._rebuild_parameter": _anything,
    "torch.Size": _one_flat_list,
    "torch.device": _plain,
    "torch.serialization._get_layout": _plain,
    "_codecs.encode": _latin1,
    "builtins.set": _one_flat_list,
    "builtins.complex": _plain,
    "numpy.core.multiarray.scalar": _anything,  # with the types that rkd.teacher allows
    "numpy._core.multiarray.scalar": _anything,
    _NUMPY_TYPE: _plain,
}
# Named as arguments of calls, never called themselves.
_PASSIVE = re.compile(
    r"torch\.((cuda|storage)\.)?[A-Za-z0-9]*Storage|torch\.(b?float|double|half|u?int|long|short|bool|complex|cfloat|q)\w*"
)


def check_pickle(file: BinaryIO, file_bytes: int) -> None:
    """Look through one pickle, from where `file` stands to behind the pickle's end.

    Args:
        file: the pickle, and perhaps more behind it.
        file_bytes: size of the whole checkpoint; its storages together cannot hold more numbers.

    Raises:
        UnsafeGlobalError: it names what a state dict does not need.
        ValueError: it calls something with odd arguments, announces more than the file holds, has another key than a
            text or a number, or is damaged.
    """
    machine = _Machine(file_bytes)
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= _MAX_OPCODES:
                raise ValueError(f"more than {_MAX_OPCODES:,} opcodes")
            machine.step(opcode.name, argument)
    except (IndexError, KeyError, AttributeError) as error:
        raise ValueError("its pickle is damaged") from error


class _Machine:
    """The stack of torch's unpickler, with descriptions for what would be made."""

    def __init__(self, room: int) -> None:
        self.room = room  # numbers that storages may still hold
        self.storages: dict[str, _Storage] = {}
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def step(self, name: str, argument: Any) -> None:
        """Do one opcode."""
        stack = self.stack
        if name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _VALUES:
            stack.append(argument)
        elif name == "MARK":
            self.marks.append(stack)
            self.stack = []
        elif name == "EMPTY_LIST":
            stack.append([])
        elif name == "GLOBAL":
            stack.append(_global(argument))
        elif name not in ("PROTO", "STOP"):
            act = _ACTIONS.get(name)
            if act is None:
                raise ValueError(f"its pickle uses {name}, which torch does not write")
            act(self)

    def since_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_of(self, count: int) -> None:
        items = tuple(self.stack[-count:])
        if len(items) < count:
            raise IndexError
        self.stack[-count:] = [items]

    def tuple_since_mark(self) -> None:
        items = tuple(self.since_mark())
        self.stack.append(items)

    def append(self) -> None:
        item = self.stack.pop()
        self.stack[-1].append(item)

    def appends(self) -> None:
        items = self.since_mark()
        self.stack[-1].extend(items)

    def set_item(self) -> None:
        _, key = self.stack.pop(), self.stack.pop()
        self.set_keys([key])

    def set_items(self) -> None:
        self.set_keys(self.since_mark()[::2])

    def set_keys(self, keys: list[Any]) -> None:
        target = self.stack[-1]
        if target is not _DICT and not (isinstance(target, _Made) and target.by.startswith("collections.")):
            raise ValueError("it sets an item of what is no dictionary")
        if not _plain(tuple(keys)):
            raise ValueError("a key of a dictionary is neither a text nor a number")

    def storage(self) -> None:
        """`("storage", type, key, device, count)`, in old files with a sixth part; the first mention of a key counts."""
        about = self.stack.pop()
        if not isinstance(about, tuple) or len(about) not in (5, 6) or about[0] != "storage":
            raise ValueError("it holds what is no tensor's memory")
        key, count = about[2], about[4]
        if not isinstance(key, str) or not isinstance(count, int) or count < 0:
            raise ValueError("it describes a tensor's memory oddly")
        if key not in self.storages:
            self.storages[key] = _Storage(count)
            self.room -= count
            if self.room < 0:
                raise ValueError("it announces more numbers than the file can hold")
        self.stack.append(self.storages[key])

    def call(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise ValueError("it calls what is no function")  # noqa: TRY004 - of the file, not of a program
        allowed = _CALLS.get(function.name)
        if allowed is None:
            raise UnsafeGlobalError(function.name)
        if not allowed(arguments):
            raise ValueError(f"it calls {function.name} with odd arguments")
        self.stack.append(_Made(function.name))

    def build(self) -> None:
        self.stack.pop()
        target = self.stack[-1]
        if not isinstance(target, _Made) or target.by not in (_ORDERED, _NUMPY_TYPE):
            raise ValueError("it sets attributes of what is neither an OrderedDict nor a number's type")

    def new_object(self) -> None:
        kind = self.stack[-2]
        raise UnsafeGlobalError(kind.name if isinstance(kind, _Global) else "an object")


_CONSTANTS: dict[str, Any] = {
    "NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "EMPTY_DICT": _DICT, "EMPTY_SET": _Made("a set"),
}  # fmt: skip
_VALUES = frozenset(("BINUNICODE", "SHORT_BINSTRING", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"))
_ACTIONS: dict[str, Callable[[_Machine], None]] = {
    "TUPLE": _Machine.tuple_since_mark,
    "TUPLE1": lambda machine: machine.tuple_of(1),
    "TUPLE2": lambda machine: machine.tuple_of(2),
    "TUPLE3": lambda machine: machine.tuple_of(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "BINPERSID": _Machine.storage,
    "REDUCE": _Machine.call,
    "BUILD": _Machine.build,
    "NEWOBJ": _Machine.new_object,
}


def _global(argument: str) -> _Global:
    """`module name` as the opcode has it."""
    module, _, name = argument.partition(" ")
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))  # Python 2's
    full = f"{module}.{name}"
    if full not in _CALLS and not _PASSIVE.fullmatch(full):
        raise UnsafeGlobalError(full.removeprefix("builtins.")[:_MAX_NAME])
    return _Global(full)
