"""Rewrites that are killed, meet each other, run out of disk, or lose their source under their hands."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from shuntyard.errors import CheckpointError, OutputError
from shuntyard.exporter import resumable
from shuntyard.exporter.quantise import quantise_matrix
from shuntyard.exporter.resumable import Workspace
from shuntyard.exporter.rewrite import rewrite
from shuntyard.exporter.safetensors_header import read_header
from tests.cli.test_interruption import on_small_disk
from tests.exporter import rewrite_victim
from tests.exporter.rewrite_victim import run, targets_of

EXPERTS, HIDDEN, INNER = 4, 480, 500
CHUNK = INNER * 32 * 2  # bytes: all rows of a new tensor and 32 columns, as CHUNK_BYTES allows
CHUNKS = EXPERTS * 2 * HIDDEN // 32
KILLS = 20

Progress = Callable[[str, int, int], None]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("source") / "source.safetensors"
    generator = torch.Generator().manual_seed(0)
    shape = (EXPERTS, HIDDEN, 2 * INNER)
    save_file({"gate_up": torch.empty(shape, dtype=torch.bfloat16).normal_(generator=generator)}, path)
    return path


@pytest.fixture
def tmp_path(tmp_path: Path) -> Iterator[Path]:
    """In memory, where the system has such a place: each run syncs eight files, for which a busy disk takes seconds."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        yield Path(folder)


@pytest.fixture
def own(source: Path, tmp_path: Path) -> Path:
    """A source to be spoiled."""
    return Path(shutil.copy(source, tmp_path / "own.safetensors"))


def content(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir()}


def partials(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if ".partial-" in p.name)


@pytest.fixture(scope="module")
def wanted(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What an undisturbed run writes, which is what numpy says."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(source, out)
    files = content(out)
    assert len(files) == 9
    [entry] = read_header(source).tensors
    stored = np.frombuffer(source.read_bytes()[entry.offset :], ml_dtypes.bfloat16).reshape(entry.shape)
    for header in (read_header(path) for path in out.glob("*.safetensors")):
        for tensor in header.tensors:
            e, part = tensor.name.split(".")
            half = stored[int(e), :, :INNER] if part == "gate" else stored[int(e), :, INNER:]
            data = files[header.file.name][tensor.offset : tensor.offset + tensor.nbytes]
            assert data == half.T.astype(np.float16).tobytes()
    return files


@pytest.fixture(scope="module")
def wanted_quantised(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The same of quantised matrices, which are what the definition says."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    run(source, out, quantised=True)
    files = content(out)
    [entry] = read_header(source).tensors
    stored = np.frombuffer(source.read_bytes()[entry.offset :], ml_dtypes.bfloat16).reshape(entry.shape)
    found = {
        tensor.name: files[header.file.name][tensor.offset : tensor.offset + tensor.nbytes]
        for header in (read_header(path) for path in out.glob("*.safetensors"))
        for tensor in header.tensors
    }
    for target in targets_of(source, quantised=True):
        e, part = target.name.split(".")
        half = stored[int(e), :, :INNER] if part == "gate" else stored[int(e), :, INNER:]
        assert target.quantize is not None
        codes, scale = quantise_matrix(half.T.astype(np.float32), target.quantize)
        assert found.pop(target.name) == codes.tobytes()
        assert found.pop(target.quantize.scale_name) == scale.tobytes()
    assert not found
    return files


def die_after(entries: int) -> Progress:
    """Raises what Ctrl-C raises, after so many entries of the journal."""
    calls = iter(range(entries))

    def progress(*call: Any) -> None:
        if next(calls, None) is None:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("what", ["plain", "quantised"])
def test_killed_at_any_time(
    source: Path, wanted: dict[str, bytes], wanted_quantised: dict[str, bytes], tmp_path: Path, what: str
) -> None:
    """Twenty deaths in the midst of work, at random times; each output is what an undisturbed run writes."""
    command = [sys.executable, "-m", "tests.exporter.rewrite_victim", str(source), str(tmp_path), str(KILLS), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    deaths = json.loads(done.stdout)
    assert sum(entries > 0 for entries in deaths) == KILLS
    assert len(set(deaths)) > KILLS // 2
    assert not partials(tmp_path)
    for out in tmp_path.iterdir():
        assert content(out) == (wanted_quantised if what == "quantised" else wanted), out


def interrupted(source: Path, out: Path, entries: int = 8) -> Path:
    """The partial directory of a run that was stopped after so many entries."""
    with pytest.raises(KeyboardInterrupt):
        run(source, out, progress=die_after(entries))
    [partial] = partials(out.parent)
    return partial


def spoil(partial: Path, shard: int) -> None:
    """Writes over the first values of a shard."""
    path = sorted((partial / "output").glob("*.safetensors"))[shard]
    offset = read_header(path).tensors[0].offset
    with path.open("rb+") as stream:
        stream.seek(offset)
        stream.write(b"spoiled!")


class TestContinued:
    def test_what_is_quantised(self, source: Path, wanted_quantised: dict[str, bytes], tmp_path: Path) -> None:
        """After each entry of the journal: a part of a matrix is done when its codes and its scales are written."""
        deaths = 0
        for workers in itertools.cycle((1, 2, 3)):
            try:
                run(source, tmp_path / "out", quantised=True, workers=workers, progress=die_after(30))
                break
            except KeyboardInterrupt:
                deaths += 1
        assert deaths > 5
        assert content(tmp_path / "out") == wanted_quantised

    def test_what_is_done_is_not_done_again(self, source: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
        partial = interrupted(source, tmp_path / "out")
        done = rewrite_victim.entries(tmp_path / "out")
        spoil(partial, 0)
        calls: list[tuple[str, int, int]] = []
        run(source, tmp_path / "out", progress=lambda *call: calls.append(call))
        assert (len(calls), calls[0]) == (1 + CHUNKS - done, ("", done * CHUNK, CHUNKS * CHUNK))
        differing = [name for name, data in content(tmp_path / "out").items() if data != wanted[name]]
        assert differing == ["model-00001-of-00008.safetensors"]

    def test_after_a_power_failure(
        self, source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """What was not synced in another boot is done again."""
        partial = interrupted(source, tmp_path / "out", entries=2)
        spoil(partial, 0)
        (tmp_path / "boot").write_text("another")
        monkeypatch.setattr(resumable, "_BOOT_ID", tmp_path / "boot")
        run(source, tmp_path / "out")
        assert content(tmp_path / "out") == wanted

    @pytest.mark.parametrize("damage", ["gone", "short", "header", "link"])
    def test_a_shard_that_is_not_as_it_was(
        self, source: Path, wanted: dict[str, bytes], tmp_path: Path, damage: str
    ) -> None:
        partial = interrupted(source, tmp_path / "out")
        shard = partial / "output" / "model-00001-of-00008.safetensors"
        spoil(partial, 0)
        if damage == "gone":
            shard.unlink()
        elif damage == "short":
            os.truncate(shard, 1000)
        elif damage == "header":
            with shard.open("rb+") as stream:
                stream.write(b"\0")
        else:
            os.link(shard, tmp_path / "elsewhere")
            before = shard.read_bytes()
        run(source, tmp_path / "out")
        assert content(tmp_path / "out") == wanted
        if damage == "link":
            assert (tmp_path / "elsewhere").read_bytes() == before

    def test_another_request_begins_anew(self, source: Path, tmp_path: Path) -> None:
        interrupted(source, tmp_path / "out")
        calls: list[int] = []
        run(source, tmp_path / "out", chunk_bytes=20_000, progress=lambda name, done, total: calls.append(done))
        assert calls[0] == 0
        assert not partials(tmp_path)

    def test_a_source_that_changed_between_two_runs(self, own: Path, wanted: dict[str, bytes], tmp_path: Path) -> None:
        """Only its data, so that its header and size tell nothing."""
        before = own.stat()
        interrupted(own, tmp_path / "out")
        data = own.read_bytes()
        own.write_bytes(data[:-2] + b"\0\0")
        os.utime(own, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
        calls: list[int] = []
        run(own, tmp_path / "out", progress=lambda name, done, total: calls.append(done))
        assert calls[0] == 0
        differing = [name for name, data in content(tmp_path / "out").items() if data != wanted[name]]
        assert differing == ["model-00008-of-00008.safetensors"]


class TestSource:
    """A source that changes, or goes, while it is read."""

    def refuse(self, own: Path, change: Callable[[], object], match: str) -> None:
        """Changes it in the middle of the work."""
        calls = iter([lambda: None, change])

        def progress(*call: Any) -> None:
            next(calls, lambda: None)()

        with pytest.raises(CheckpointError, match=match):
            run(own, own.parent / "out", progress=progress)
        assert not (own.parent / "out").exists()
        assert not partials(own.parent)

    def test_overwritten(self, own: Path) -> None:
        def change() -> None:
            with own.open("rb+") as stream:
                stream.seek(-2, os.SEEK_END)
                stream.write(b"\0\0")

        self.refuse(own, change, "own.safetensors: changed while it was read")

    def test_longer(self, own: Path) -> None:
        self.refuse(own, lambda: os.truncate(own, own.stat().st_size + 1), "own.safetensors: changed while")

    def test_shorter(self, own: Path) -> None:
        self.refuse(own, lambda: os.truncate(own, 50_000), r"own.safetensors: ends at byte \d+, within a tensor")

    def test_gone(self, own: Path) -> None:
        self.refuse(own, own.unlink, "own.safetensors: cannot be read: No such file")

    def test_replaced(self, own: Path) -> None:
        """By a file of the same size and time."""

        def change() -> None:
            twin = shutil.copy2(own, own.with_name("twin"))
            Path(twin).replace(own)

        self.refuse(own, change, "own.safetensors: changed while it was read")

    def test_changed_before_it_begins(self, own: Path, tmp_path: Path) -> None:
        """Since its header was read."""
        targets = targets_of(own)
        tensors = {"gate_up": torch.zeros(EXPERTS, HIDDEN, 2 * INNER), "another": torch.zeros(3)}
        save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, own)
        with pytest.raises(CheckpointError, match="own.safetensors: tensor 'gate_up' no longer lies where it lay"):
            rewrite(targets, workspace(tmp_path), source_fingerprint="")
        own.unlink()
        with pytest.raises(CheckpointError, match="own.safetensors: cannot be read: No such file"):
            rewrite(targets, workspace(tmp_path / "again"), source_fingerprint="")


def workspace(folder: Path) -> Workspace:
    (folder / "output").mkdir(parents=True)
    return Workspace(folder / "out", folder / "output", folder / "journal")


def test_files_that_are_not_ours_are_not_touched(own: Path, tmp_path: Path) -> None:
    """A hard link of a checkpoint's shard may bear the name of a new one."""
    work = workspace(tmp_path)
    os.link(own, work.directory / "model-00001-of-00001.safetensors")
    before = own.read_bytes()
    with pytest.raises(FileExistsError):
        rewrite(targets_of(own), work, source_fingerprint="")
    assert own.read_bytes() == before
    assert (work.directory / "model-00001-of-00001.safetensors").samefile(own)


def test_two_at_once(source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same request, in two processes: one writes it, the other leaves it alone."""
    monkeypatch.setattr(resumable, "_PATIENCE", 0.1)
    begun, go_on = threading.Event(), threading.Event()

    def progress(*call: Any) -> None:
        begun.set()
        go_on.wait(60)

    first = threading.Thread(target=run, args=(source, tmp_path / "out"), kwargs={"progress": progress})
    first.start()
    try:
        assert begun.wait(60)
        command = "import sys; from tests.exporter.rewrite_victim import *; run(Path(sys.argv[1]), Path(sys.argv[2]))"
        second = subprocess.run(
            [sys.executable, "-c", command, source, tmp_path / "out"], capture_output=True, text=True, check=False
        )
        assert "OutputError" in second.stderr and "out: another run is writing it" in second.stderr
    finally:
        go_on.set()
        first.join()
    assert content(tmp_path / "out") == wanted
    assert not partials(tmp_path)


ON_DISK = """
import os, shutil, sys
from pathlib import Path
from tests.exporter import rewrite_victim
if sys.argv[1] == "unaware":
    shutil.disk_usage = lambda path: type("Usage", (), {"free": 10**15})
disk = Path(os.environ["DISK"])
try:
    rewrite_victim.run(Path(sys.argv[2]), disk / "out")
except Exception as error:
    print(type(error).__name__, str(error))
print("left:", sorted(os.listdir(disk)))
"""


@pytest.mark.parametrize("how", ["aware", "unaware"])
def test_a_small_disk(source: Path, wanted: dict[str, bytes], tmp_path: Path, how: str) -> None:
    """Too small by some bytes: known before anything is written, and where that was wrong, by the first reservation."""
    script = tmp_path / "script.py"
    script.write_text(ON_DISK)
    run_it = f"PYTHONPATH={Path.cwd()}:$PYTHONPATH {sys.executable} {script} {how} {source}"
    needed = sum(len(data) for name, data in wanted.items() if name.endswith(".safetensors"))
    done = on_small_disk(tmp_path, needed // 1024 - 10, run_it)
    assert done.returncode == 0, done.stderr
    if how == "aware":
        assert f"OutputError {tmp_path / 'disk' / 'out'}: the new weights need {needed:,} bytes, " in done.stdout
        assert "hint: free some space" in done.stdout
    else:
        assert f"OutputError {tmp_path / 'disk' / 'out'}: the disk is full" in done.stdout
    assert "left: []" in done.stdout
    done = on_small_disk(tmp_path, needed // 1024 + 200, run_it)
    assert done.stdout == "left: ['out']\n", done.stdout + done.stderr


def test_what_is_there_already_needs_no_space(
    source: Path, wanted: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One shard of eight was begun, and has its space."""
    interrupted(source, tmp_path / "out")
    needed = sum(len(data) for name, data in wanted.items() if "model-0000" in name and "00001-" not in name)
    free = needed - 1
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": free}))
    with pytest.raises(OutputError, match=f"the new weights need {needed:,} bytes, {needed - 1:,} are free"):
        run(source, tmp_path / "out")
    free = needed
    run(source, tmp_path / "out")
    assert content(tmp_path / "out") == wanted


MEASURED = """
import sys
from tests.exporter.rewrite_victim import *
source, out = Path(sys.argv[1]), Path(sys.argv[2])
[entry] = read_header(source).tensors
turned, shape = sys.argv[4] == "turned", entry.shape
how = None if sys.argv[3] == "plain" else Quantize(sys.argv[3], 128 if sys.argv[3] == "group" else 0, "scale")
dtype = "BF16" if how is None else how.dtype
new = Target("new", dtype, shape[::-1] if turned else shape, ((Piece(entry, transpose=turned),),), how)
with resumable_directory(out, "0" * 64) as work:
    rewrite([new], work, source_fingerprint="", workers=1)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


@pytest.mark.parametrize(
    ("what", "lies", "most"),
    [
        ("plain", "turned", 160),
        ("channel", "turned", 260),  # 96 of values, 48 of codes, at a time
        ("channel", "lying", 90),
        ("tensor", "lying", 90),
        ("group", "lying", 90),
    ],
)
def test_memory_does_not_grow_with_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, what: str, lies: str, most: int
) -> None:
    """A matrix of 384 MiB, all zeros in a sparse file, takes less, with all that Python and numpy take."""
    folder = tmp_path_factory.mktemp("sparse")
    source, (rows, columns) = folder / "sparse.safetensors", (24 * 1024, 8 * 1024)
    header = {"zeros": {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}}
    text = json.dumps(header).encode()
    source.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(source, 8 + len(text) + 2 * rows * columns)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, source, folder / "out", what, lies], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < most * 1024
    [shard] = (folder / "out").glob("*.safetensors")
    assert shard.stat().st_size > {"plain": 16, "group": 4}.get(what, 8) * rows * columns // 8
    shutil.rmtree(folder / "out")
