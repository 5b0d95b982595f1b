"""Read a pickle without running it.

Python's own unpickler executes whatever the file says, and even with every class forbidden a file
can make it allocate without bound or overflow the C stack. This one interprets the opcodes that
`pickletools` parses and never imports, looks up or calls anything the file names: a class or
function becomes an `Opaque` with that name, unless the caller's table has a constructor for it.

Every opcode takes a bounded time and memory, or one in proportion to its own bytes: nothing is
copied, hashed, compared or printed whose size the file can choose by referring to it again.
"""

import pickletools
from collections.abc import Callable, Mapping
from typing import Protocol

from fcvit.errors import UnreadableFile

# The largest variant with optimiser and EMA takes 280,000, and 3,000 bytes of its file for each.
# One opcode can take about 100 bytes of memory, so these bound it by a small multiple of the file.
MAX_OPCODES = 1_000_000
FREE_OPCODES = 100_000
BYTES_PER_OPCODE = 32
MAX_ARGUMENTS = 16
MAX_NAME = 256  # characters of a module's or class's name


class Stream(Protocol):
    """What a pickle is read from; `mmap` has it, and never returns more than the file holds."""

    def read(self, size: int, /) -> bytes: ...
    def readline(self) -> bytes: ...


class Opaque:
    """Something the file names that is not data: kept by name, never executed."""

    __slots__ = ("args", "name", "state")

    def __init__(self, name: str, args: tuple = ()):
        self.name = name
        self.args = args
        self.state: object = None

    def build(self, state: object) -> None:
        """What pickle's BUILD gives the object after its construction."""
        self.state = state


Constructor = Callable[..., object]
_MARK = object()


def ordered_dict(*items: object) -> object:
    """A constructor for `collections.OrderedDict`, which Python 3 fills only after construction.

    Items as arguments stay what they are: their keys are not safe to hash, nor checked for doubles.
    """
    return Opaque("collections.OrderedDict", items) if items else {}


def load(
    stream: Stream,
    constructors: Mapping[str, Constructor],
    file_size: int,
    persistent: Callable[[object], object] | None = None,
) -> object:
    """Interpret one pickle from the stream's position up to its STOP.

    Args:
        stream: positioned at the pickle; left behind its end.
        constructors: "module.name" -> what to call for it, on arguments of any type. It must not
            do work in proportion to them: the file can hand over the same large one many times.
        file_size: how large a file the pickle is part of, which bounds how long it may be.
        persistent: turns a persistent id (how PyTorch refers to storages) into an object.

    Raises:
        UnreadableFile: truncated, malformed, too long, or using opcodes that no checkpoint needs.
    """
    try:
        return _Machine(constructors, persistent).run(stream, file_size)
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

    def run(self, stream: Stream, file_size: int) -> object:
        limit = min(FREE_OPCODES + file_size // BYTES_PER_OPCODE, MAX_OPCODES)
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):  # type: ignore[arg-type]
            if count >= limit:
                raise UnreadableFile(
                    f"pickle of over {limit} opcodes in a file of {file_size} bytes: no FCViT checkpoint needs that"
                )
            name = opcode.name
            if name in _PUSH_ARGUMENT:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name == "STOP":
                return self.stack.pop()
            else:
                step = getattr(self, f"op_{name.lower()}", None)
                if step is None:
                    raise UnreadableFile(f"pickle opcode {name}: not used by any checkpoint, refused")
                step(argument)
        raise UnreadableFile("pickle ends without STOP: truncated")

    def pop_mark(self) -> list:
        """Everything above the topmost mark, which is removed too."""
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

    def op_proto(self, _: object) -> None:
        pass

    op_frame = op_proto

    def op_mark(self, _: object) -> None:
        self.stack.append(_MARK)

    def op_pop(self, _: object) -> None:
        self.stack.pop()

    def op_pop_mark(self, _: object) -> None:
        self.pop_mark()

    def op_dup(self, _: object) -> None:
        self.stack.append(self.stack[-1])

    def op_put(self, index: int) -> None:
        if not 0 <= index < MAX_OPCODES:  # picklers count up; numbers of the file's choice could collide as keys
            raise UnreadableFile("pickle: a memo index that is negative or absurdly large")
        self.memo[index] = self.stack[-1]

    op_binput = op_long_binput = op_put

    def op_memoize(self, _: object) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    op_binget = op_long_binget = op_get

    def op_empty_list(self, _: object) -> None:
        self.stack.append([])

    def op_empty_dict(self, _: object) -> None:
        self.stack.append({})

    def op_empty_set(self, _: object) -> None:
        self.stack.append(Opaque("builtins.set"))

    def op_list(self, _: object) -> None:
        self.stack.append(self.pop_mark())

    def op_tuple(self, _: object) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def op_frozenset(self, _: object) -> None:
        self.stack.append(Opaque("builtins.frozenset", tuple(self.pop_mark())))

    def op_dict(self, _: object) -> None:
        items = self.pop_mark()
        self.stack.append({})
        self.set_items(items)

    def op_tuple1(self, _: object) -> None:
        self.stack[-1:] = [tuple(self.stack[-1:])]

    def op_tuple2(self, _: object) -> None:
        self.stack[-2:] = [(self.stack[-2], self.stack[-1])]

    def op_tuple3(self, _: object) -> None:
        self.stack[-3:] = [(self.stack[-3], self.stack[-2], self.stack[-1])]

    def op_append(self, _: object) -> None:
        self.append([self.stack.pop()])

    def op_appends(self, _: object) -> None:
        self.append(self.pop_mark())

    op_additems = op_appends

    def append(self, items: list) -> None:
        if isinstance(self.stack[-1], list):
            self.stack[-1].extend(items)

    def op_setitem(self, _: object) -> None:
        value = self.stack.pop()
        self.set_items([self.stack.pop(), value])

    def op_setitems(self, _: object) -> None:
        self.set_items(self.pop_mark())

    def set_items(self, items: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            return  # a subclass of dict that is opaque to us
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only text is safe as a key: nested tuples could exhaust the C stack, numbers all have one hash.
            key = key if isinstance(key, str) else Opaque("key", (key,))
            if key in target:
                raise UnreadableFile(f"entry {key[:80]!r} stands twice in one dictionary")
            target[key] = value

    def op_global(self, argument: str) -> None:
        self.stack.append(Opaque(argument.replace(" ", ".")))

    def op_stack_global(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise UnreadableFile("pickle: a global whose name is no text")
        if len(module) > MAX_NAME or len(name) > MAX_NAME:
            raise UnreadableFile(f"pickle: a global whose name has {len(module)} + {len(name)} characters")
        self.stack.append(Opaque(f"{module}.{name}"))

    def op_inst(self, argument: str) -> None:
        self.stack.append(self.construct(Opaque(argument.replace(" ", ".")), tuple(self.pop_mark())))

    def op_obj(self, _: object) -> None:
        what, *args = self.pop_mark()
        self.stack.append(self.construct(what, tuple(args)))

    def op_reduce(self, _: object) -> None:
        args = self.stack.pop()
        self.stack[-1] = self.construct(self.stack[-1], args)

    op_newobj = op_reduce

    def op_newobj_ex(self, _: object) -> None:
        self.stack.pop()  # keyword arguments: nothing we construct takes any
        self.op_reduce(None)

    def op_build(self, _: object) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Opaque):
            self.stack[-1].build(state)  # a dict's attributes (`_metadata`) are of no use here

    def op_binpersid(self, _: object) -> None:
        if self.persistent is None:
            raise UnreadableFile("pickle: refers to storages outside of it, which this format does not have")
        self.stack.append(self.persistent(self.stack.pop()))


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_PUSH_ARGUMENT = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    )
)
