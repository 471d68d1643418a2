"""Models and engines on the CPU: files that change under them, and every way to the end of their life."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from children import command, run_python
from gguf_files import Value, random_blocks, write_gguf
from small_model import CHANGES, LOSSES, K, is_mapped, replace_file, write_small_model

import qmm
from qmm.errors import ClosedError, CopyError, GGUFError, MappingError
from qmm.loaders import FileMapping, GGUFIndex
from qmm.loaders.files import OpenFile
from qmm.loaders.gguf import index as gguf
from qmm.model import Model

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def path(tmp_path: Path, rng: np.random.Generator) -> Path:
    path = tmp_path / "model.gguf"
    write_small_model(path, rng)
    return path


@pytest.fixture
def x(rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal((3, K)).astype(np.float32)


# Files that change ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "says"), CHANGES.values(), ids=CHANGES)
def test_a_file_that_changes_is_an_error_before_its_next_use(
    path: Path, x: np.ndarray, change: Callable[[Path], object], says: str
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        engine.matmul("a", x)
        change(path)
        for use in (
            lambda: engine.matmul("a", x),
            lambda: engine.dequantize("b"),
            lambda: engine.address("a"),
            lambda: model["b"].data,
        ):
            with pytest.raises(MappingError, match=f"model.gguf: .*{says}"):
                use()
    assert not is_mapped(path)


@pytest.mark.parametrize("lose", LOSSES.values(), ids=LOSSES)
def test_a_model_goes_on_with_its_file_when_the_name_is_gone(
    path: Path, x: np.ndarray, lose: Callable[[Path], object]
) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected, bytes_before = engine.matmul("a", x), model["b"].data.tobytes()
        lose(path)
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        assert model["b"].data.tobytes() == bytes_before
        if path.exists():
            with qmm.open(path) as new, qmm.Engine(new, "cpu") as again:
                assert not again.matmul("a", x).any()
    assert not is_mapped(path)


def test_one_file_under_two_names_is_used_when_the_first_name_is_gone(tmp_path: Path, rng: np.random.Generator) -> None:
    """As in the cache of Hugging Face, where revisions are links to blobs, and old ones are pruned."""
    for folder in ("blobs", "snapshots/old", "snapshots/new"):
        (tmp_path / folder).mkdir(parents=True)
    write_small_model(tmp_path / "blobs/0123", rng)
    names = [tmp_path / f"snapshots/{revision}/model.gguf" for revision in ("old", "new")]
    for name in names:
        name.symlink_to("../../blobs/0123")
    x = np.ones(K, np.float32)
    old, new = (qmm.open(name) for name in names)
    with qmm.Engine(new, "cpu") as engine:
        expected = engine.matmul("a", x)
        names[0].unlink()
        old.close()
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
        with qmm.open(names[1]) as again, qmm.Engine(again, "cpu") as other:
            assert again.path == names[1]
            np.testing.assert_array_equal(other.matmul("a", x), expected)
    new.close()


def test_a_relative_path_is_good_after_chdir(path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(path, {"w": ("F32", (1, 8), bytes(32))}, metadata={"tokens": ["a", "b"]})
    monkeypatch.chdir(path.parent)
    with qmm.open("model.gguf") as model, qmm.Engine(model, "cpu") as engine:
        monkeypatch.chdir("/")
        assert engine.matmul("w", np.ones(8, np.float32)).tolist() == [0]
        assert model["w"].data.size == 32
        assert model.metadata["tokens"] == ["a", "b"]
        assert (model.path, model["w"].info.path) == (path, path)
    metadata = model.metadata
    assert qmm.open(path).metadata["tokens"] == metadata["tokens"]


def test_metadata_is_read_from_the_open_file_or_from_the_same_one(path: Path) -> None:
    write_gguf(path, {}, metadata={"tokens": ["a", "b"], "more": ["c"], "rest": ["d"]})
    with qmm.open(path) as model:
        path.rename(path.with_name("elsewhere"))
        write_gguf(path, {}, metadata={"tokens": ["x", "y"], "more": ["z"], "rest": ["?"]})
        assert model.metadata["tokens"] == ["a", "b"]
    with pytest.raises(GGUFError, match=r"was written or replaced since it was opened.*'more' cannot be read"):
        model.metadata["more"]
    path.with_name("elsewhere").replace(path)
    assert model.metadata["more"] == ["c"]
    path.unlink()
    with pytest.raises(GGUFError, match=r"No such file.*'rest' cannot be read"):
        model.metadata["rest"]


def test_header_and_weights_are_of_one_file_whatever_becomes_of_the_name(
    path: Path, x: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is replaced between the reading of its header and its mapping."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
    share = FileMapping.of.__func__  # type: ignore[attr-defined]

    def replace_and_map(cls: type[FileMapping], file: OpenFile) -> FileMapping:
        replace_file(path)
        mapping: FileMapping = share(cls, file)
        return mapping

    monkeypatch.setattr(FileMapping, "of", classmethod(replace_and_map))
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        np.testing.assert_array_equal(engine.matmul("a", x), expected)
    index = GGUFIndex.read(path)
    replace_file(path)
    with pytest.raises(MappingError, match=r"model.gguf: was written or replaced since it was opened: inode was"):
        Model(index)


def test_shards_of_two_versions_of_a_model_are_not_mixed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [tmp_path / f"model-{number:05d}-of-00002.gguf" for number in (1, 2)]

    def write(folder: Path, value: float) -> None:
        for number, named in enumerate(paths):
            keys = {"split.no": Value("uint16", number), "split.count": Value("uint16", 2), "split.tensors.count": 2}
            weights = np.full(8, value, np.float32).tobytes()
            write_gguf(folder / named.name, {f"w{number}": ("F32", (1, 8), weights)}, metadata=keys)

    write(tmp_path, 1)
    (tmp_path / "new").mkdir()
    write(tmp_path / "new", 2)
    read_file = gguf._read_file

    def replace_and_read(file: OpenFile) -> object:
        found = read_file(file)
        for named in paths:
            if (tmp_path / "new" / named.name).exists():
                (tmp_path / "new" / named.name).replace(named)
        return found

    monkeypatch.setattr(gguf, "_read_file", replace_and_read)
    with pytest.raises(GGUFError, match=r"00001-of-00002.gguf: was written or replaced since it was opened"):
        qmm.open(paths[0])
    with qmm.open(paths[0]) as model:
        assert [tensor.data.view(np.float32)[0] for tensor in model.values()] == [2, 2]


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_of_models_engines_and_tensors_are_shared(
    path: Path, x: np.ndarray, copied: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    """A module that holds an engine is copied for a moving average: the copy multiplies by the same weights."""
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
        for original in (model, engine, model["a"], model["a"].info, model.metadata):
            module = {"it": original, "list": [original]}
            again = copied(module)
            assert again["it"] is original or again["it"] == original
        other = copied({"engine": engine})["engine"]
        np.testing.assert_array_equal(other.matmul(copied({"tensor": model["a"]})["tensor"], x), expected)
    assert other.closed
    with pytest.raises(ClosedError):
        other.matmul("a", x)
    assert not is_mapped(path)


def test_pickling_says_what_to_do_in_the_worker(path: Path) -> None:
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        for original, way in (
            (model, rf"qmm\.open\('{path}'\)"),
            (engine, rf"qmm\.Engine\('{path}'\)"),
            (model["a"], rf"qmm\.open\('{path}'\)\['a'\]"),
            (model.mapping(path), "cannot be copied or pickled"),
        ):
            with pytest.raises(CopyError, match=way):
                pickle.dumps(original)
            with pytest.raises(TypeError):  # what libraries look for
                pickle.dumps([original])
        again = pickle.loads(pickle.dumps((model["a"].info, GGUFIndex.read(path))))
        assert again[0] == model["a"].info
        assert again[1].tensors == {name: tensor.info for name, tensor in model.items()}


# The end of an engine -------------------------------------------------------------------------------------------------


def test_an_engine_that_is_dropped_gives_up_its_file(path: Path, x: np.ndarray) -> None:
    engine = qmm.Engine(qmm.open(path), "cpu")
    engine.matmul("a", x)
    assert is_mapped(path)
    del engine
    assert not is_mapped(path)


def test_an_engine_that_is_dropped_in_a_cycle_gives_up_its_file(path: Path, x: np.ndarray) -> None:
    engine = qmm.Engine(qmm.open(path), "cpu")
    engine.itself = engine  # type: ignore[attr-defined]
    engine.matmul("a", x)
    del engine
    assert is_mapped(path)
    gc.collect()
    assert not is_mapped(path)


def test_an_error_in_the_block_passes_and_the_engine_is_closed(path: Path) -> None:
    with pytest.raises(KeyError, match="mine"), qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        raise KeyError("mine")
    assert engine.closed
    assert model.closed
    assert not is_mapped(path)


def test_an_engine_that_could_not_be_made_leaves_nothing_behind(path: Path) -> None:
    with qmm.open(path) as model:
        for wrong in ({"device": "tpu"}, {"tensors": ["c"]}, {"activations": "int4"}):
            with pytest.raises(qmm.QmmError):
                qmm.Engine(model, **{"device": "cpu", **wrong})  # type: ignore[arg-type]
    assert not is_mapped(path)


def test_closing_waits_for_the_products_of_other_threads(path: Path, x: np.ndarray) -> None:
    """Otherwise the pages would go from under a product, and the process with them."""
    expected = None
    for _ in range(20):
        model = qmm.open(path)
        engine = qmm.Engine(model, "cpu")
        model.close()
        expected = engine.matmul("a", x)
        results: list[np.ndarray] = []
        ends: list[str] = []

        def work(engine: qmm.Engine = engine, results: list = results, ends: list = ends) -> None:
            try:
                while True:
                    results.append(engine.matmul("a", x))
            except ClosedError as error:
                ends.append(str(error))

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        closers = [threading.Thread(target=engine.close) for _ in range(2)]
        for thread in closers:
            thread.start()
        for thread in threads + closers:
            thread.join()
        assert not is_mapped(path)
        assert len(ends) == 4
        assert all("Make another one" in end for end in ends)
        assert all(np.array_equal(result, expected) for result in results)


def test_a_forked_child_may_close_while_the_parents_threads_multiply(path: Path) -> None:
    """They are not in the child, where nothing of theirs would ever end."""
    code = """
import os, signal, threading, warnings
import numpy as np, qmm

warnings.simplefilter("ignore", DeprecationWarning)
engine = qmm.Engine(qmm.open(sys.argv[1]), "cpu")
x = np.ones((512, 256), np.float32)
engine.matmul("a", x)
stop = threading.Event()

def work():
    while not stop.is_set():
        engine.matmul("a", x)

threads = [threading.Thread(target=work) for _ in range(4)]
[thread.start() for thread in threads]
for _ in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        engine.matmul("b", x)
        engine.close()
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), end=" ")
stop.set()
"""
    done = run_python(code, path)
    assert (done.returncode, done.stdout) == (0, "7 " * 10), done.stderr


def test_two_processes_multiply_by_one_file(path: Path, x: np.ndarray) -> None:
    code = """
import numpy as np, qmm

with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cpu") as engine:
    x = np.load(sys.argv[2])
    print("ready", flush=True)
    sys.stdin.read()
    for _ in range(100):
        y = engine.matmul("a", x)
    np.save(sys.argv[3], y)
"""
    np.save(path.with_name("x.npy"), x)
    outputs = [path.with_name(f"y{number}.npy") for number in range(2)]
    children = [
        subprocess.Popen(
            command(code, path, path.with_name("x.npy"), out), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for out in outputs
    ]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"  # both have it mapped before either multiplies
    for child in children:
        child.communicate(timeout=120)
        assert child.returncode == 0
    with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
        expected = engine.matmul("a", x)
    for out in outputs:
        np.testing.assert_array_equal(np.load(out), expected)


def test_a_thousand_engines_leave_nothing_behind(path: Path, x: np.ndarray) -> None:
    def cycle() -> None:
        with qmm.open(path) as model, qmm.Engine(model, "cpu") as engine:
            engine.matmul("a", x)

    def held() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(Path("/proc/self/maps").read_text().splitlines())

    def anonymous_nbytes() -> int:
        found = qmm.cli.smoke.anonymous_nbytes()
        assert found is not None
        return found

    import qmm.cli.smoke

    for _ in range(100):
        cycle()
    descriptors, mappings = held()
    before = anonymous_nbytes()
    for _ in range(1000):
        cycle()
    assert held()[0] == descriptors
    assert held()[1] <= mappings + 2  # the allocator's own may come and go
    assert anonymous_nbytes() - before < 1 << 20  # less than a page for each
    assert not is_mapped(path)


# Ctrl-C ---------------------------------------------------------------------------------------------------------------


def test_ctrl_c_in_the_middle_of_products_leaves_an_engine_that_multiplies_and_closes(path: Path) -> None:
    """Threads that still multiplied then would read an unmapped file, and write into memory that is given back."""
    code = """
import functools, gc
import numpy as np, qmm
from interrupts import interrupted
from qmm.kernels.ops.cpu import products as cpu

gc.disable()  # in what it calls an exception would be forgotten
cpu.HELPER_NBYTES = 1
cpu.set_threads(3)
x = np.ones((256, 256), np.float32)
count = 0
for round_ in range(300):
    engine = qmm.Engine(qmm.open(sys.argv[1]), "cpu")
    expected = engine.matmul("a", x)
    count += interrupted(functools.partial(engine.matmul, "a", x), 1e-4 + 1e-5 * (round_ % 100), 1000)
    assert np.array_equal(engine.matmul("a", x), expected)
    engine.model.close()
    engine.close()
print(count, sys.argv[1] + "\\n" in open("/proc/self/maps").read())
"""
    done = run_python(code, path)
    assert (done.returncode, done.stdout) == (0, "300 False\n"), done.stderr


def test_ctrl_c_while_numba_is_imported_is_heard(path: Path) -> None:
    """Its parts in C say of any exception in the modules that they need that they failed to import."""
    code = """
import importlib.abc, signal
import numpy as np, qmm

class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "numba._devicearray":
            signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Interrupting())
engine = qmm.Engine(qmm.open(sys.argv[1]), "cpu")
x = np.ones((1, 256), np.float32)
try:
    engine.matmul("a", x)
except KeyboardInterrupt:
    print("heard")
print(engine.matmul("a", x).shape)
"""
    done = run_python(code, path)
    assert (done.returncode, done.stdout, done.stderr) == (0, "heard\n(1, 64)\n", "")


def test_ctrl_c_anywhere_from_opening_to_closing_leaves_nothing_open(path: Path) -> None:
    """By an alarm at any time, and at every place where Python looks for signals."""
    code = """
import gc, json, os
import numpy as np, qmm
from interrupts import interrupted, what_is_left

x = np.ones((3, 256), np.float32)

def cycle():
    with qmm.open(sys.argv[1]) as model, qmm.Engine(model, "cpu") as engine:
        engine.matmul("a", x)
        engine.dequantize("b")

def held():
    return len(os.listdir("/proc/self/fd")), sys.argv[1] + "\\n" in open("/proc/self/maps").read()

cycle()
before = held()
count = sum(interrupted(cycle, 1e-4 + 2e-6 * round_, 100) for round_ in range(500))
gc.collect()
print(json.dumps([count, held() == before, *what_is_left(cycle, held)]))
"""
    done = run_python(code, path)
    assert done.returncode == 0, done.stderr
    count, same, places, wrong = json.loads(done.stdout)
    assert count > 400
    assert same
    assert places > 200
    assert wrong == []


@pytest.fixture
def _ctrl_c_is_heard() -> Iterator[None]:
    """A job in the background ignores Ctrl-C, as its children would."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_ctrl_c_is_heard")
def test_ctrl_c_while_closing_comes_when_all_is_closed(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with qmm.open(path) as model:
        engine = qmm.Engine(model, "cpu")
    close = engine._weights.close

    def interrupted() -> None:
        signal.raise_signal(signal.SIGINT)
        close()

    monkeypatch.setattr(engine._weights, "close", interrupted)
    with pytest.raises(KeyboardInterrupt):
        engine.close()
    assert not is_mapped(path)
    engine.close()


@pytest.mark.usefixtures("_ctrl_c_is_heard")
@pytest.mark.parametrize("options", [(), ("--paranoid",)], ids=["verify", "paranoid"])
def test_ctrl_c_ends_a_long_job_at_once_and_its_children(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "long.gguf"
    shape = (4096, 4096)
    data = random_blocks("Q8_0", shape, np.random.default_rng(0))
    write_gguf(path, {f"w{number}": ("Q8_0", shape, data) for number in range(6)})
    # Not by `python -m qmm`: that ends by SIGINT, if it comes in the middle of text that eval() runs.
    arguments = command("from qmm.cli.app import main; main()", "verify", path, "--device", "cpu", "--n", "1", *options)
    child = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True
    )
    assert child.stderr is not None
    awaited = "between guards" if options else "on the CPU"
    while awaited not in child.stderr.readline():
        assert child.poll() is None
    time.sleep(0.5)
    os.killpg(child.pid, signal.SIGINT)  # as a terminal does
    started = time.monotonic()
    out, err = child.communicate(timeout=60)
    assert time.monotonic() - started < 10
    assert child.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
