"""Read a pickle without running it.

Python's own unpickler executes whatever the file says, and even with every class forbidden a file
can make it allocate without bound or overflow the C stack. This one interprets the opcodes that
`pickletools` describes and never imports, looks up or calls anything the file names: a class or
function becomes an `Opaque` with that name, unless the caller's table has a constructor for it.

Every opcode takes a bounded time and memory, or one in proportion to its own bytes: nothing is
copied, hashed, compared or printed whose size the file can choose by referring to it again.
What would change an object after its construction is never ignored if it could change numbers.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from fcvit.errors import UnreadableFile

# The largest variant with optimizer and EMA takes 280,000, and 3,000 bytes of its file for each.
# One opcode can take about 100 bytes of memory, so these bound it by a small multiple of the file.
MAX_OPCODES = 1_000_000
FREE_OPCODES = 100_000
BYTES_PER_OPCODE = 32
MAX_ARGUMENTS = 16
MAX_NAME = 256  # characters of a module's or class's name
MAX_LINE = 128 << 10  # bytes of a number or text that a line break ends
# Python keeps text with one letter beyond Latin-1 at two or four bytes a letter.
MAX_WIDE = 4 << 20  # bytes of such texts, all together
_WIDE = re.compile(rb"[\xc4-\xff]")  # begins a letter beyond Latin-1 in UTF-8


class Stream:
    """Read bytes in memory from front to back; large parts of them are not copied.

    Args:
        data: the whole file.
        start, end: the part of it that is read.
    """

    def __init__(self, data: bytes, start: int = 0, end: int | None = None):
        self.data, self.position = data, start
        self.end = len(data) if end is None else end
        self._wide = 0

    def read(self, size: int) -> bytes:
        """Return the next bytes, or as many as there are."""
        start, self.position = self.position, min(self.position + size, self.end)
        return self.data[start : self.position]

    def readline(self) -> bytes:
        """Return the bytes up to the next line break, this included."""
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + MAX_LINE)) + 1
        if not stop:
            raise UnreadableFile(f"damaged pickle (a line of over {MAX_LINE} bytes, or without an end)")
        return self.read(stop - self.position)

    def sized(self, layout: str) -> memoryview:
        """Return a view of bytes that follow their count, which is stored as `layout` says."""
        (size,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        if not 0 <= size <= self.end - self.position:
            raise UnreadableFile(f"damaged pickle (expected {size} bytes, {self.end - self.position} are left)")
        start, self.position = self.position, self.position + size
        return memoryview(self.data)[start : self.position]

    def text(self, layout: str) -> str:
        """Return UTF-8 text that follows its size in bytes."""
        view = self.sized(layout)
        if _WIDE.search(self.data, self.position - len(view), self.position):
            self._count_wide(len(view))
        return str(view, "utf-8", "surrogatepass")

    def escaped(self) -> str:
        """Return a line of text with escapes, which may stand for any letter."""
        line = self.readline()
        self._count_wide(len(line))
        return str(line[:-1], "raw-unicode-escape")

    def _count_wide(self, size: int) -> None:
        self._wide += size
        if self._wide > MAX_WIDE:
            raise UnreadableFile(f"pickle: over {MAX_WIDE >> 20} MiB of text beyond Latin-1: no checkpoint needs that")

    def string(self, layout: str) -> str | bytes:
        """Return a string of Python 2: text if it is ASCII; readers differ in the encoding of the rest."""
        content = bytes(self.sized(layout))
        return content.decode() if content.isascii() else content

    def name(self) -> tuple[str, str]:
        """Return the module and the name of a global."""
        return self.readline()[:-1].decode(), self.readline()[:-1].decode()


class Opaque:
    """Something the file names that is not data: kept by name, never executed."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple = ()):
        self.name = name
        self.args = args
        self.items: dict | None = None  # of a subclass of dict
        self.state: object = None

    def build(self, state: object) -> None:
        """Take what pickle's BUILD gives the object after its construction."""
        self.state = state


Constructor = Callable[..., object]
_MARK = object()


def ordered_dict(*items: object) -> object:
    """Construct a `collections.OrderedDict`, which Python 3 fills only after construction.

    Items as arguments stay what they are: their keys are not safe to hash, nor checked for doubles.
    """
    return Opaque("collections.OrderedDict", items) if items else {}


def load(
    stream: Stream, constructors: Mapping[str, Constructor], persistent: Callable[[object], object] | None = None
) -> object:
    """Interpret one pickle from the stream's position up to its STOP.

    Args:
        stream: positioned at the pickle; left behind its end.
        constructors: "module.name" -> what to call for it, on arguments of any type. It must not
            do work in proportion to them: the file can hand over the same large one many times.
            Nor may it keep a list or dictionary of them, which the file can still change.
        persistent: turns a persistent id (how PyTorch refers to storages) into an object.

    Raises:
        UnreadableFile: truncated, malformed, too long, or using opcodes that no checkpoint needs.
    """
    try:
        return _Machine(constructors, persistent).run(stream)
    except UnreadableFile:
        raise
    except Exception as error:  # what a malformed file can raise has no useful bound
        raise UnreadableFile(f"damaged pickle ({type(error).__name__}: {str(error)[:80]})") from error


class _Machine:
    def __init__(self, constructors: Mapping[str, Constructor], persistent: Callable[[object], object] | None):
        self.constructors = constructors
        self.persistent = persistent
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self, stream: Stream) -> object:
        file_size = len(stream.data)
        limit = min(FREE_OPCODES + file_size // BYTES_PER_OPCODE, MAX_OPCODES)
        for _ in range(limit):
            code = stream.read(1)
            if code not in _OPCODES:
                what = f"opcode {code!r} unknown" if code else "it ends without STOP: truncated"
                raise UnreadableFile(f"damaged pickle ({what})")
            name, reader = _OPCODES[code]
            argument = reader(stream) if reader else None
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            else:
                if name not in _STEPS:
                    raise UnreadableFile(f"pickle opcode {name}: not used by any checkpoint, refused")
                _STEPS[name](self, argument)
        raise UnreadableFile(
            f"pickle of over {limit} opcodes in a file of {file_size} bytes: no FCViT checkpoint needs that"
        )

    def pop_mark(self) -> list:
        """Remove and return everything above the topmost mark, and the mark."""
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                items = self.stack[index + 1 :]
                del self.stack[index:]
                return items
        raise UnreadableFile("pickle: a mark is missing")

    def construct(self, what: object, args: object) -> object:
        args = args if isinstance(args, tuple) else (args,)
        if type(what) is Opaque and not what.args:
            constructor = self.constructors.get(what.name)
            if constructor and len(args) > MAX_ARGUMENTS:
                raise UnreadableFile(f"pickle: {what.name} with {len(args)} arguments")
            return constructor(*args) if constructor else Opaque(what.name, args)
        return Opaque("call", (what, args))

    def put(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:  # picklers count up; numbers of the file's choice could collide as keys
            raise UnreadableFile("pickle: a memo index that is negative or absurdly large")
        self.memo[index] = self.stack[-1]

    def pack(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[place] for place in range(-count, 0))]

    def append(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif type(self.stack[-1]) is not Opaque:
            raise UnreadableFile("pickle: items for something that has none")

    def set_items(self, items: list, new: dict | None = None) -> None:
        if new is not None:
            self.stack.append(new)
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = target = {} if target.items is None else target.items
        if not isinstance(target, dict):
            raise UnreadableFile("pickle: items for something that has none")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only text is safe as a key: nested tuples could exhaust the C stack, numbers all have one hash.
            key = key if isinstance(key, str) else Opaque("key", (key,))
            if key in target:
                raise UnreadableFile(f"entry {key[:80]!r} stands twice in one dictionary")
            target[key] = value

    def push_global(self, argument: tuple[object, object]) -> None:
        module, name = argument
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnreadableFile("pickle: a global whose name is no text")
        if len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise UnreadableFile(f"pickle: a global whose name has {len(module)} + {len(name)} characters")
        self.stack.append(Opaque(f"{module}.{name}"))

    def instance(self, argument: tuple[object, object]) -> None:
        args = tuple(self.pop_mark())
        self.push_global(argument)
        self.stack[-1] = self.construct(self.stack[-1], args)

    def make_instance(self) -> None:
        what, *args = self.pop_mark()
        self.stack.append(self.construct(what, tuple(args)))

    def reduce(self) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.construct(self.stack[-1], args)

    def build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], dict):
            return  # its attributes (`_metadata`) are of no use here
        build = getattr(self.stack[-1], "build", None)
        if build is None:
            raise UnreadableFile("pickle: a state for something that has none")
        build(state)

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise UnreadableFile("pickle: refers to storages outside of it, which this format does not have")
        self.stack.append(self.persistent(self.stack.pop()))


# What the other opcodes do with the machine and their argument.
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    **dict.fromkeys(("PROTO", "FRAME"), lambda machine, _: None),
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), _Machine.put),
    "MEMOIZE": lambda machine, _: machine.put(len(machine.memo)),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), lambda machine, index: machine.stack.append(machine.memo[index])),
    "EMPTY_LIST": lambda machine, _: machine.stack.append([]),
    "EMPTY_DICT": lambda machine, _: machine.stack.append({}),
    "EMPTY_SET": lambda machine, _: machine.stack.append(Opaque("builtins.set")),
    "LIST": lambda machine, _: machine.stack.append(machine.pop_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_mark())),
    "FROZENSET": lambda machine, _: machine.stack.append(Opaque("builtins.frozenset", tuple(machine.pop_mark()))),
    "DICT": lambda machine, _: machine.set_items(machine.pop_mark(), {}),
    "TUPLE1": lambda machine, _: machine.pack(1),
    "TUPLE2": lambda machine, _: machine.pack(2),
    "TUPLE3": lambda machine, _: machine.pack(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    **dict.fromkeys(("APPENDS", "ADDITEMS"), lambda machine, _: machine.append(machine.pop_mark())),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.pop_mark()),
    "GLOBAL": _Machine.push_global,
    "STACK_GLOBAL": lambda machine, _: machine.push_global((machine.stack.pop(), machine.stack.pop())[::-1]),
    "INST": _Machine.instance,
    "OBJ": lambda machine, _: machine.make_instance(),
    **dict.fromkeys(("REDUCE", "NEWOBJ"), lambda machine, _: machine.reduce()),
    # Its keyword arguments are dropped: nothing that is constructed takes any.
    "NEWOBJ_EX": lambda machine, _: (machine.stack.pop(), machine.reduce()),
    "BUILD": lambda machine, _: machine.build(),
    "BINPERSID": lambda machine, _: machine.persistent_id(),
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSH_ARGUMENT = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
# Where `pickletools` would copy or decode whatever the file says, or gives one text for two.
_READERS: dict[str, Callable[[Stream], object]] = {
    "SHORT_BINSTRING": lambda stream: stream.string("<B"),
    "BINSTRING": lambda stream: stream.string("<i"),
    "SHORT_BINUNICODE": lambda stream: stream.text("<B"),
    "BINUNICODE": lambda stream: stream.text("<I"),
    "BINUNICODE8": lambda stream: stream.text("<Q"),
    "SHORT_BINBYTES": lambda stream: bytes(stream.sized("<B")),
    "BINBYTES": lambda stream: stream.sized("<I"),
    "BINBYTES8": lambda stream: stream.sized("<Q"),
    "BYTEARRAY8": lambda stream: stream.sized("<Q"),
    "UNICODE": Stream.escaped,
    "GLOBAL": Stream.name,
    "INST": Stream.name,
}
_OPCODES: dict[bytes, tuple[str, Any]] = {
    opcode.code.encode("latin-1"): (opcode.name, _READERS.get(opcode.name) or (opcode.arg and opcode.arg.reader))
    for opcode in pickletools.opcodes
}
