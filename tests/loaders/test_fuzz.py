"""Damaged GGUF files by the thousand, each read by qmm and by a strict reference (tests/support/gguf_reference.py).

Whatever the file: qmm accepts it exactly if the reference does and it stays within the limits of header.py, and then
both say the same of every key, array, tensor and byte. Otherwise qmm raises a QmmError that begins with the file and
names a place. Either takes a second at most, and the run as a whole 64 MB.

Two engines make the files. `test_damage_*` changes good files at random, knowing where every number and text of their
headers lies: 20,000 cases. `test_models_*` has hypothesis build models from whole parts, and lie about them.

--draws=10 runs ten times as many cases, all of them others (the factor seeds them); --draws=0.1 a tenth. A failure of
the first engine gives the case's number and the file in hexadecimal: `damaged(bases(folder), number)` with the same
factor makes it again. Hypothesis prints its smallest example. A case found here becomes a test in test_damage.py.
"""

from __future__ import annotations

import math
import os
import random
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import gguf_reference as reference
import numpy as np
import pytest
import tiers
from gguf_files import SCALAR_TYPES, Array, Value, write_gguf
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from qmm.errors import QmmError
from qmm.loaders import GGUFIndex
from qmm.loaders.gguf import header, strings
from qmm.loaders.gguf import index as gguf

FACTOR = tiers.draws
CASES = int(10_000 * FACTOR)  # of each of the two tests of the first engine
EXAMPLES = max(1, int(300 * FACTOR))
SEED = int(FACTOR * 1000)
MEMORY = 64 << 20

# The oracle.

PLACE = re.compile(
    r"at byte \d+: |takes bytes \d+ to \d+|(tensor|key) ['\"]|general\.alignment|split\.|[Ss]hards? |is empty \("
)


def check(path: Path) -> bool:
    """Compare what qmm and the reference say of the model in ``path``. Returns whether qmm accepted it."""
    started = time.process_time()
    ours = outcome(GGUFIndex.read, path)
    assert time.process_time() - started < 1
    theirs = outcome(reference.read_model, path)
    sizes = [excess(file.usage) for file in theirs.files] if isinstance(theirs, reference.Model) else []
    if isinstance(ours, QmmError):
        assert isinstance(theirs, reference.InvalidError) or any(may for may, _ in sizes), f"valid, but refused: {ours}"
        check_message(path, ours)
    else:
        assert isinstance(theirs, reference.Model), f"accepted, but {theirs}"
        assert not any(must for _, must in sizes), "accepted beyond a limit"
        check_index(path, ours, theirs)
    return isinstance(ours, GGUFIndex)


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What ``read`` returns, or the error that it may raise; others get through."""
    try:
        return read(path)
    except (QmmError, reference.InvalidError) as error:
        return error


def excess(usage: reference.Usage) -> tuple[bool, bool]:
    """Whether a header may be refused for its size, and whether it must be."""
    must = (
        max(usage.keys, usage.tensors) > header.COUNT_LIMIT
        or usage.short_texts > header.TEXT_LIMIT
        or usage.strings > header.STRING_LIMIT
        or usage.nested > header.NESTED_LIMIT
        or usage.depth > header.DEPTH_LIMIT
    )
    # The header's length is looked at with every read of the file, not with every field; whether a text of more than
    # 1 KiB counts depends on those before.
    return must or usage.nbytes > header.HEADER_LIMIT or usage.texts > header.TEXT_LIMIT, must


def check_message(path: Path, error: QmmError) -> None:
    message = str(error)
    file, colon, rest = message.partition(".gguf: ")
    assert colon, message
    assert Path(file).parent == path.parent, message
    assert PLACE.search(rest), f"no place: {message}"
    assert re.search(r"\d", rest) or "should be an integer" in rest or "is missing" in rest, f"no number: {message}"
    assert rest.isprintable(), message
    assert len(rest) < 3000, message
    for position in re.findall(r"at byte (\d+)", rest):
        assert int(position) <= Path(f"{file}.gguf").stat().st_size, message


def check_index(path: Path, index: GGUFIndex, model: reference.Model) -> None:
    first = model.files[0]
    assert (index.path, index.files) == (path, tuple(model.paths))
    assert (index.version, index.alignment) == (first.version, first.alignment)
    assert [*index.tensors] == [tensor.name for tensor in model.tensors]
    for ours, theirs in zip(index.tensors.values(), model.tensors, strict=True):
        assert (ours.name, ours.type, ours.shape, ours.offset, ours.nbytes, ours.path) == theirs
    assert list(index.metadata) == list(first.metadata)
    for key, (kind, expected) in first.metadata.items():
        assert index.metadata.type_of(key) == kind
        check_value(index.metadata[key], expected)


def check_value(ours: Any, expected: Any) -> None:
    if isinstance(expected, reference.Numbers):
        assert isinstance(ours, np.ndarray)
        assert (ours.dtype.name, ours.tobytes()) == expected
    elif isinstance(expected, list):
        assert len(ours) == len(expected)
        for one, other in zip(ours, expected, strict=True):
            check_value(one, other)
    else:
        assert type(ours) is type(expected)
        assert repr(ours) == repr(expected)  # NaN is not equal to itself


# The first engine: good files, changed.


class Base(NamedTuple):
    """A good file, and where the numbers and texts of its header are."""

    data: bytes
    fields: list[reference.Field]


def bases(folder: Path) -> list[Base]:
    row, four = ("F32", (1, 8), bytes(32)), ("Q8_0", (2, 1, 3, 32), bytes(6 * 34))
    scalars = {kind: Value(kind, 1) for kind in SCALAR_TYPES}
    arrays = {f"[{kind}]": Array(kind, [1, 0, 1]) for kind in SCALAR_TYPES}
    deep = Array("array", [Array("uint8", [1])])
    for _ in range(6):
        deep = Array("array", [deep])
    models: list[tuple[dict[Any, Any], dict[Any, Any], dict[str, Any]]] = [
        ({"a": row, "b": row}, {"k": 1}, {}),
        ({"a": four, "b": four, "c": ("Q4_K", (1, 256), bytes(144))}, {"n": "name"}, {"alignment": 64}),
        ({"a": (99, (5,), bytes(40)), "b": row, "c": (4, (2, 2), bytes(33)), "d": ("F16", (0, 3), b"")}, {}, {}),
        ({"late": row, "soon": row}, {}, {"offsets": {"late": 32, "soon": 0}, "alignment": 8}),
        ({"w": row}, scalars | arrays, {"version": 2}),
        ({"w": row}, {"t": ["a", "", "ö" * 9, "\0\1" * 40] * 80, "u": ["x"]}, {}),
        ({}, {"deep": deep, "wide": Array("array", [Array("string", ["x", ""]), Array("bool", [1])] * 2)}, {}),
        ({"aa": row, "ab": row, "ac": row, "ad": row}, {"ka": 1, "kb": 2, "kc": 3.5, "kd": True}, {}),
        ({"v": row}, {"t": ["a"] * 5, "u": ["b"] * 5}, {}),  # this and the next two: limits that are sums
        ({"v": row}, {"s": "x" * 60, "r": "y" * 60}, {}),
        ({"v": row}, {key: Array("array", [Array("int8", [1])] * 3) for key in "tu"}, {}),
        ({"w": row}, {"split.count": Value("uint16", 1), "split.no": Value("uint16", 0)}, {"write_alignment": True}),
    ]
    made = []
    for tensors, metadata, more in models:
        write_gguf(folder / "base.gguf", tensors, metadata=metadata, **more)
        file = reference.read_file(folder / "base.gguf")
        made.append(Base((folder / "base.gguf").read_bytes(), file.fields))
    return made


LIMITS = ("HEADER_LIMIT", "TEXT_LIMIT", "STRING_LIMIT", "NESTED_LIMIT", "DEPTH_LIMIT", "COUNT_LIMIT")
REAL_LIMITS = [getattr(header, name) for name in LIMITS]
INTERESTING = [
    *range(14), 16, 24, 30, 31, 64, 99, 255, 256, 2**15, 2**16,
    *(power + less for power in (*(2**n for n in (31, 32, 60, 61, 62, 63)), *REAL_LIMITS) for less in (-1, 0, 1)),
    2**64 - 1,
]  # fmt: skip


def set_number(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    _, position, nbytes = dice.choice([field for field in base.fields if field.nbytes in (1, 2, 4, 8)])
    if dice.random() < 0.4:
        value = int.from_bytes(data[position : position + nbytes], "little") + dice.choice((-32, -8, -1, 1, 8, 32))
    else:
        value = dice.choice((*INTERESTING, len(data) - 1, len(data), len(data) + 1, position, position + nbytes))
    data[position : position + nbytes] = (value % 256**nbytes).to_bytes(nbytes, "little")


def swap_fields(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    first = dice.choice(base.fields)
    second = dice.choice([field for field in base.fields if field.nbytes == first.nbytes])
    left, right = (slice(field.position, field.position + field.nbytes) for field in (first, second))
    data[left], data[right] = data[right], data[left]


def copy_field(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    first = dice.choice(base.fields)
    same = [field for field in base.fields if (field.kind, field.nbytes) == (first.kind, first.nbytes)]
    second = dice.choice(same)
    data[first.position : first.position + first.nbytes] = data[second.position : second.position + second.nbytes]


def change_bytes(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    position = dice.randrange(min(len(data), base.fields[-1].position + 8)) if data else 0
    fresh = dice.choice((0, 1, 0x22, 0x7F, 0x80, 0xC3, 0xFF, 1 << dice.randrange(8), dice.randrange(256)))
    data[position : position + 1] = bytes([fresh])


def truncate(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    del data[dice.randrange(len(data) + 1) :]


def extend(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    data += dice.choice((bytes(1), bytes(31), bytes(64), dice.randbytes(33)))


def span(dice: random.Random, base: Base) -> slice:
    """From one boundary between fields to another behind it."""
    first, last = sorted((dice.randrange(len(base.fields)), dice.randrange(len(base.fields))))
    return slice(base.fields[first].position, base.fields[min(last, first + 6)].position)


def repeat(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    again = span(dice, base)
    data[again.start : again.start] = data[again]


def remove(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    del data[span(dice, base)]


def splice(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    other = dice.choice(others)
    data[span(dice, base)] = other.data[span(dice, other)]


def lengthen(dice: random.Random, base: Base, data: bytearray, others: list[Base]) -> None:
    """A longer or shorter text with the length that it then has."""
    texts = [field for field in base.fields if field.kind in ("key", "string", "name", "element")]
    if texts:
        _, position, nbytes = dice.choice(texts)
        text = dice.choice((b"", b"k", b"\0\n'\"", "ö🎈".encode(), b"\xff", b"x" * 300, bytes(40)))
        data[position - 8 : position + nbytes] = len(text).to_bytes(8, "little") + text


CHANGES: list[Callable[[random.Random, Base, bytearray, list[Base]], None]] = [
    set_number, set_number, set_number, swap_fields, copy_field, change_bytes, change_bytes, truncate, extend,
    repeat, remove, splice, lengthen, lengthen,
]  # fmt: skip


def damaged(good: list[Base], number: int) -> bytes:
    """Case ``number`` of this factor."""
    dice = random.Random(SEED << 40 | number)
    base = dice.choice(good)
    data = bytearray(base.data)
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        dice.choice(CHANGES)(dice, base, data, good)
    return bytes(data)


@contextmanager
def memory_within(nbytes: int) -> Iterator[None]:
    """Let the process take so much more memory than it has, or fail with MemoryError: tracemalloc costs ten times."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def run_damage(folder: Path, numbers: range) -> None:
    good = bases(folder)
    path = folder / "damaged.gguf"
    accepted = 0
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        path.write_bytes(good[0].data)
        assert check(path)  # imports what is imported at the first file
        with memory_within(MEMORY):
            for number in numbers:
                data = damaged(good, number)
                os.ftruncate(descriptor, len(data))
                os.pwrite(descriptor, data, 0)
                try:
                    accepted += check(path)
                except Exception as error:
                    raise AssertionError(f"case {number}, --draws={FACTOR:g}: {error!r}\n{data.hex()}") from error
    finally:
        os.close(descriptor)
    assert 0.1 < accepted / len(numbers) < 0.9  # or one half of the oracle hardly ran


def test_damage_at_the_real_limits(tmp_path: Path) -> None:
    run_damage(tmp_path, range(CASES))


def test_damage_where_small_files_reach_every_limit_and_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, limit in zip(LIMITS, (1500, 120, 9, 5, 4, 4), strict=True):
        monkeypatch.setattr(header, name, limit)
    monkeypatch.setattr(gguf, "COUNT_LIMIT", header.COUNT_LIMIT)
    monkeypatch.setattr(header, "FIRST_READ_NBYTES", 64)
    monkeypatch.setattr(header, "LAST_READ_NBYTES", 256)
    monkeypatch.setattr(strings, "PLAIN_STEPS", 3)
    monkeypatch.setattr(strings, "WINDOW_NBYTES", 128)
    run_damage(tmp_path, range(CASES, 2 * CASES))


# The second engine: models built of whole parts, with lies among them.

SPLIT = ("split.no", "split.count", "split.tensors.count")
texts = st.text(max_size=8) | st.sampled_from(["k", b"k", "a\0b", "line\nbreak", "x" * 200])  # "k" twice
odd = st.sampled_from(INTERESTING) | st.integers(0, 600)


def numbers(kind: str) -> st.SearchStrategy[Any]:
    if kind == "bool":
        return st.integers(0, 1)
    if kind.startswith("float"):
        return st.floats(width=int(kind.removeprefix("float")))  # type: ignore[arg-type]
    half = 2 ** (int(kind.removeprefix("u").removeprefix("int")) - 1)
    return st.integers(0, 2 * half - 1) if kind[0] == "u" else st.integers(-half, half - 1)


def listed(item: str, elements: st.SearchStrategy[Any]) -> st.SearchStrategy[Array]:
    count = st.integers(0, 19).flatmap(lambda choice: odd if choice == 19 else st.none())
    return st.builds(Array, st.just(item), st.lists(elements, max_size=5), count)


kinds = st.sampled_from(list(SCALAR_TYPES))
scalars = kinds.flatmap(lambda kind: st.builds(Value, st.just(kind), numbers(kind)))
flat = listed("string", texts) | kinds.flatmap(lambda kind: listed(kind, numbers(kind)))
arrays = st.recursive(flat, lambda inner: listed("array", inner), max_leaves=8)
values = st.one_of(scalars, texts, arrays)
alignments = st.sampled_from([1, 2, 4, 8, 24, 32, 64])
unusual = st.sampled_from([b"\xff", Array("string", ["", b"a\xc3"]), Value("bool", 2), Array("bool", [0, 2])])


class Shard(NamedTuple):
    """What write_gguf is given for one file, and by how many bytes the file is longer then, or shorter if below 0."""

    tensors: dict[Any, tuple[int, list[int], bytes]]
    arguments: dict[str, Any]
    more: int


LIES = [*SPLIT, "split type", "name", "other shard", "dimensions", "offset", "tensors", "keys", "version", "length"]
LIES += ["alignment", "bytes", "missing"]


@st.composite
def shards(draw: st.DrawFn, number: int, count: int, total: int, counted: bool, lies: set[str]) -> Shard:
    """Shard ``number`` of ``count`` of a model of ``total`` tensors (a key says so if it is ``counted``)."""

    def say(what: str, truth: Any, lie: st.SearchStrategy[Any]) -> Any:
        return draw(lie) if what in lies else truth

    tensors: dict[Any, tuple[int, list[int], bytes]] = {}
    for index in range(total // count):
        kind = draw(st.sampled_from([*reference.BLOCKS, 0, 4, 99, 2**32 - 1]))
        _, block, nbytes = reference.BLOCKS.get(kind, ("", 1, 3))
        shape = [*draw(st.lists(st.integers(0, 3), max_size=5)), draw(st.integers(0, 2)) * block]
        name = say("name", f"tensor {number}.{index}", texts)
        name = say("other shard", name, st.just(f"tensor {(number + 1) % count}.{index}"))
        tensors[name] = (kind, shape, bytes(math.prod(shape) // block * nbytes))
    metadata = draw(st.dictionaries(texts, values, max_size=4))
    if draw(st.booleans()):
        truth = Value("uint32", draw(alignments))
        metadata["general.alignment"] = say("alignment", truth, st.builds(Value, st.just("uint64"), odd) | values)
    if "bytes" in lies:
        metadata[draw(st.sampled_from(["key", b"\xff"]))] = draw(unusual)
    if count > 1:
        for key, truth in zip(SPLIT[: 2 + counted], (number, count, total)[: 2 + counted], strict=True):
            said = Value("uint16", say(key, truth, st.integers(0, 9)))
            metadata[key] = say("split type", said, st.just(said) | st.builds(Value, st.just("uint64"), odd) | values)
    arguments = {
        "metadata": metadata,
        "version": say("version", 3, st.integers(0, 5)),
        "dimensions": {name: say("dimensions", shape[::-1], st.lists(odd, max_size=5))
                       for name, (_, shape, _) in tensors.items()},
        "offsets": {name: draw(odd) for name in tensors if say("offset", False, st.booleans())},
        "tensor_count": say("tensors", None, odd),
        "key_count": say("keys", None, odd),
    }  # fmt: skip
    return Shard(tensors, arguments, say("length", 0, st.integers(-200, 200)))


@st.composite
def split_models(draw: st.DrawFn) -> tuple[list[Shard | None], int]:
    """The shards of a model, None for one that is missing, and which of them is opened."""
    count = draw(st.integers(1, 3))
    total = count * draw(st.integers(0, 3))
    opened, liar = draw(st.integers(0, count - 1)), draw(st.integers(0, count - 1))
    lies = draw(st.sets(st.sampled_from(LIES), max_size=2))
    counted = "other shard" not in lies and draw(st.booleans())  # or the count would tell
    model: list[Shard | None] = [
        draw(shards(number, count, total, counted, lies if number == liar else set())) for number in range(count)
    ]
    if "missing" in lies and liar != opened:
        model[liar] = None
    return model, opened


def write_model(folder: Path, model: list[Shard | None]) -> list[Path]:
    paths = [folder / f"model-{number:05d}-of-{len(model):05d}.gguf" for number in range(1, len(model) + 1)]
    for path, shard in zip(paths, model, strict=True):
        path.unlink(missing_ok=True)
        if shard is not None:
            write_gguf(path, shard.tensors, **shard.arguments)
            os.truncate(path, max(0, path.stat().st_size + shard.more))
    return paths


def test_models_of_one_to_three_files(tmp_path: Path) -> None:
    outcomes: Counter[tuple[bool, bool]] = Counter()

    @seed(SEED)
    @settings(max_examples=EXAMPLES, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(split_models())
    def run(built: tuple[list[Shard | None], int]) -> None:
        model, opened = built
        outcomes[len(model) > 1, check(write_model(tmp_path, model)[opened])] += 1

    run()
    if EXAMPLES >= 300:
        assert len(outcomes) == 4, outcomes  # files and split models, both accepted and refused
