"""Read a pickle without executing it.

Python's own unpickler executes any code in the file. Even if all classes are forbidden, a file can make it allocate
unlimited memory or overflow the C stack. This reader interprets the opcodes that `pickletools` describes. It never
imports, looks up or calls anything that the file names. A class or function becomes an `Opaque` with its name, unless
the caller passes a constructor for the name.

The time and memory for each opcode are bounded or proportional to the opcode's own size. The reader does not copy,
hash, compare or print objects whose size the file can multiply by repeated references. An opcode that changes an
object after its construction is never ignored if it could change numbers.
"""

import pickletools
import re
import struct
from collections.abc import Callable, Mapping
from typing import Any

from fcvit.errors import UnreadableFile

# The largest variant with optimizer and EMA needs 280,000 opcodes, one for every 3,000 bytes of its file.
# One opcode can take about 100 bytes of memory, so these limits bound the memory by a small multiple of the file.
MAX_OPCODES = 1_000_000
FREE_OPCODES = 100_000
BYTES_PER_OPCODE = 32
MAX_ARGUMENTS = 16
MAX_NAME = 256  # characters in the name of a module or class
MAX_LINE = 128 << 10  # bytes of a number or text that ends with a newline
# Python stores text with a character beyond Latin-1 at two or four bytes a character.
MAX_WIDE = 4 << 20  # total bytes of these texts
_WIDE = re.compile(rb"[\xc4-\xff]")  # first byte of a character beyond Latin-1 in UTF-8


class Stream:
    """A reader of bytes in memory that does not copy large parts.

    Args:
        data: Contents of the file.
        start: Position of the first byte to read.
        end: Position after the last byte to read, or None for the end of the file.
    """

    def __init__(self, data: bytes, start: int = 0, end: int | None = None):
        self.data, self.position = data, start
        self.end = len(data) if end is None else end
        self._wide = 0

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, or fewer at the end."""
        start, self.position = self.position, min(self.position + size, self.end)
        return self.data[start : self.position]

    def readline(self) -> bytes:
        """Return the bytes up to and including the next newline."""
        stop = self.data.find(b"\n", self.position, min(self.end, self.position + MAX_LINE)) + 1
        if not stop:
            raise UnreadableFile(f"damaged pickle (a line has over {MAX_LINE} bytes or no end)")
        return self.read(stop - self.position)

    def sized(self, layout: str) -> memoryview:
        """Return a view of bytes that are preceded by their count. `layout` is the `struct` format of the count."""
        (size,) = struct.unpack(layout, self.read(struct.calcsize(layout)))
        if not 0 <= size <= self.end - self.position:
            raise UnreadableFile(f"damaged pickle (expected {size} bytes, {self.end - self.position} are left)")
        start, self.position = self.position, self.position + size
        return memoryview(self.data)[start : self.position]

    def text(self, layout: str) -> str:
        """Return UTF-8 text that is preceded by its size in bytes."""
        view = self.sized(layout)
        if _WIDE.search(self.data, self.position - len(view), self.position):
            self._count_wide(len(view))
        return str(view, "utf-8", "surrogatepass")

    def escaped(self) -> str:
        """Return a line of text with escape sequences, which can represent any character."""
        line = self.readline()
        self._count_wide(len(line))
        return str(line[:-1], "raw-unicode-escape")

    def _count_wide(self, size: int) -> None:
        self._wide += size
        if self._wide > MAX_WIDE:
            raise UnreadableFile(f"pickle: over {MAX_WIDE >> 20} MiB of text beyond Latin-1, which no checkpoint needs")

    def string(self, layout: str) -> str | bytes:
        """Return a Python 2 string: text if it is ASCII, otherwise bytes, because the encoding is unknown."""
        content = bytes(self.sized(layout))
        return content.decode() if content.isascii() else content

    def name(self) -> tuple[str, str]:
        """Return the module and the name of a global."""
        return self.readline()[:-1].decode(), self.readline()[:-1].decode()


class Opaque:
    """An object in the file that is not plain data. It is represented by its name and never executed."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple = ()):
        self.name = name
        self.args = args
        self.items: dict | None = None  # items of a dict subclass
        self.state: object = None

    def build(self, state: object) -> None:
        """Store the state that pickle's BUILD opcode sets after construction."""
        self.state = state


Constructor = Callable[..., object]
_MARK = object()


def ordered_dict(*items: object) -> object:
    """Construct a `collections.OrderedDict`, which Python 3 fills only after construction.

    Items passed as arguments are kept unread, because their keys are not safe to hash and not checked for duplicates.
    """
    return Opaque("collections.OrderedDict", items) if items else {}


def load(
    stream: Stream, constructors: Mapping[str, Constructor], persistent: Callable[[object], object] | None = None
) -> object:
    """Interpret one pickle from the stream's position to its STOP opcode.

    Args:
        stream: Stream at the start of the pickle. It is moved to the end of the pickle.
        constructors: Functions by "module.name". They are called with arguments of any type. A function must not do
            work proportional to its arguments, because the file can pass the same large object many times. It must
            not keep a list or dictionary among them, because the file can still change it.
        persistent: Function that converts a persistent id, with which PyTorch refers to storages, to an object.

    Raises:
        UnreadableFile: If the pickle is truncated, malformed, too long, or uses opcodes that no checkpoint needs.
    """
    try:
        return _Machine(constructors, persistent).run(stream)
    except UnreadableFile:
        raise
    except Exception as error:  # a malformed file can raise almost any exception
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
                what = f"unknown opcode {code!r}" if code else "truncated: it ends without STOP"
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
                    raise UnreadableFile(f"pickle opcode {name} is rejected, because no checkpoint uses it")
                _STEPS[name](self, argument)
        raise UnreadableFile(
            f"pickle has over {limit} opcodes in a file of {file_size} bytes, which no FCViT checkpoint needs"
        )

    def pop_mark(self) -> list:
        """Remove the topmost mark and everything above it. Return the items above it."""
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
                raise UnreadableFile(f"pickle: {what.name} is called with {len(args)} arguments")
            return constructor(*args) if constructor else Opaque(what.name, args)
        return Opaque("call", (what, args))

    def put(self, index: int) -> None:
        # Picklers count up. Indices chosen by the file could have colliding hashes.
        if not 0 <= index < MAX_OPCODES:
            raise UnreadableFile("pickle: a memo index is negative or too large")
        self.memo[index] = self.stack[-1]

    def pack(self, count: int) -> None:
        self.stack[-count:] = [tuple(self.stack[index] for index in range(-count, 0))]

    def append(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)
        elif type(self.stack[-1]) is not Opaque:
            raise UnreadableFile("pickle: items are added to an object that cannot have items")

    def set_items(self, items: list, new: dict | None = None) -> None:
        if new is not None:
            self.stack.append(new)
        target = self.stack[-1]
        if type(target) is Opaque:
            target.items = target = {} if target.items is None else target.items
        if not isinstance(target, dict):
            raise UnreadableFile("pickle: items are added to an object that cannot have items")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only text is a safe key. Nested tuples could overflow the C stack, and numbers can have equal hashes.
            key = key if isinstance(key, str) else Opaque("key", (key,))
            if key in target:
                raise UnreadableFile(f"entry {key[:80]!r} occurs twice in one dictionary")
            target[key] = value

    def push_global(self, argument: tuple[object, object]) -> None:
        module, name = argument
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnreadableFile("pickle: the name of a global is not text")
        if len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise UnreadableFile(f"pickle: the name of a global has {len(module)} + {len(name)} characters")
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
            return  # the attributes of a state dict (`_metadata`) are not needed
        build = getattr(self.stack[-1], "build", None)
        if build is None:
            raise UnreadableFile("pickle: a state is set on an object that cannot have one")
        build(state)

    def persistent_id(self) -> None:
        if self.persistent is None:
            raise UnreadableFile("pickle: it refers to external storages, which this format does not have")
        self.stack.append(self.persistent(self.stack.pop()))


# Actions of the other opcodes. Each is called with the machine and the opcode's argument.
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
    # The keyword arguments are dropped, because no constructor takes any.
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
# Replacements for `pickletools` readers that copy or decode without a limit, or join two texts into one.
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
