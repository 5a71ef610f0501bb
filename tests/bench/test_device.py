"""bench/device.sh, with stand-ins for cmake, nvcc, Python and the runner: what it refuses and leaves behind."""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKED = {"shuntyard_conformance", "libshuntyard_plugins.so", "cases.bin.gz", "plain.bin.gz", "timing.bin.gz"}
TOOLS = "bash basename cat cp dirname du gzip ls mkdir mktemp mv realpath rm rmdir sed tail tee timeout touch uname"

CMAKE = """case $1 in
    -S) mkdir -p "$4/plugins/native/conformance" ;;
    *) cd "$2/plugins/native" && touch libshuntyard_plugins.so conformance/shuntyard_conformance ;;
esac"""
"""Which configures into -B, and builds what is asked for."""

PYTHON = """[ "$1" = -c ] && exit
while [ $# -gt 1 ]; do [ "$1" != --write ] || echo "$PWD" >"$2"; shift; done"""
"""Which has all packages, and writes from where it was called."""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)
    return path


class Here:
    """A directory to work in, and a PATH with nothing else than is put there."""

    def __init__(self, base: Path) -> None:
        self.bin, self.place, self.temporary = base / "bin", base / "place", base / "temporary"
        for directory in (self.bin, self.place, self.temporary):
            directory.mkdir()
        for tool in TOOLS.split():
            found = shutil.which(tool)
            if found is None:
                pytest.skip(f"there is no {tool}")
            (self.bin / tool).symlink_to(found)
        self.python = program(base / "env" / "python", PYTHON)
        program(self.bin / "cmake", CMAKE)
        program(self.bin / "nvcc", "exit")

    def run(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit status and words; nothing may stay in the directory for temporary files."""
        known = {"PATH": str(self.bin), "TMPDIR": str(self.temporary), "PYTHON": str(self.python)}
        command = [str(self.bin / "bash"), os.path.relpath(ROOT / "bench/device.sh", self.place), *arguments]
        done = subprocess.run(
            command, cwd=self.place, env={**known, **variables}, capture_output=True, text=True, check=False, timeout=60
        )
        assert not list(self.temporary.iterdir())
        return done.returncode, done.stdout, done.stderr

    def refuses(self, words: str, *arguments: str, **variables: str) -> None:
        """In one line that holds the words, and a hint; all files stay as they are, and there are no others."""
        before = self.files()
        status, _, said = self.run(*arguments, **variables)
        lines = said.splitlines()[-2:]
        assert status == 2 and lines[0].startswith("error: ") and words in lines[0], said
        assert lines[1].startswith("hint: ") and self.files() == before

    def files(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.place)): path.read_bytes() if path.is_file() else b""
            for path in self.place.rglob("*")
        }

    def runner(self, text: str) -> None:
        """Packs, with this in the place of the runner."""
        packed = self.place / "packed"
        packed.mkdir()
        program(packed / "shuntyard_conformance", text)
        (packed / "libshuntyard_plugins.so").write_text("library")
        for name in ("cases", "plain", "timing"):
            with gzip.open(packed / f"{name}.bin.gz", "wb") as file:
                file.write(name.encode())


@pytest.fixture
def here(tmp_path: Path) -> Here:
    return Here(tmp_path)


@pytest.mark.parametrize("exists", [False, True])
def test_packing_from_elsewhere(here: Here, exists: bool) -> None:
    """With relative paths, from a directory that is not the project's."""
    if exists:
        (here.place / "packed").mkdir()
    status, text, said = here.run("pack", "./packed", CASES="5", PYTHON="../env/python")
    assert (status, said) == (0, "") and str(here.place / "packed") in text
    assert {path.name for path in (here.place / "packed").iterdir()} == PACKED | {"build.log"}
    assert [path.name for path in here.place.iterdir()] == ["packed"]
    assert (here.place / "packed/plain.bin.gz").read_text().strip() == str(ROOT)


def test_what_is_there_stays(here: Here) -> None:
    (here.place / "own/build").mkdir(parents=True)
    (here.place / "own/build/precious").write_text("mine")
    (here.place / "file").write_text("mine, too")
    (here.place / "other.partial").mkdir()
    here.refuses("own is there already", "pack", "own")
    here.refuses("file is there already", "pack", "file")
    here.refuses("other.partial is there already", "pack", "other")
    here.refuses("cannot be written", "pack", "file/below")


def test_what_packing_needs(here: Here) -> None:
    here.refuses("there is no Python at none", "pack", "packed", PYTHON="none")
    here.refuses("CASES is '0'", "pack", "packed", CASES="0")
    here.refuses("JOBS is 'many'", "pack", "packed", JOBS="many")
    program(here.python, "echo \"ModuleNotFoundError: No module named 'ml_dtypes'\" >&2; exit 1")
    here.refuses("cannot make cases: ModuleNotFoundError: No module named 'ml_dtypes'", "pack", "packed")
    program(here.python, PYTHON)
    (here.bin / "cmake").unlink()
    here.refuses("there is no cmake", "pack", "packed")
    program(here.python.parent / "cmake", CMAKE)  # in the environment, which need not be active
    (here.bin / "nvcc").unlink()
    if not Path("/usr/local/cuda/bin/nvcc").exists():
        here.refuses("there is no nvcc", "pack", "packed")
    cuda = here.bin.parent / "cuda"
    program(cuda / "bin/nvcc", "exit")
    assert here.run("pack", "packed", CUDA_HOME=str(cuda))[0] == 0


def test_nothing_stays_of_what_fails(here: Here) -> None:
    program(here.bin / "cmake", 'echo "file.cu(7): error" >&2; exit 1')
    here.refuses("cmake fails", "pack", "packed")
    assert "file.cu(7): error" in here.run("pack", "packed")[2]
    program(here.bin / "cmake", CMAKE)
    program(here.python, '[ "$1" = -c ]')
    here.refuses("the cases cannot be made", "pack", "packed")


def test_only_what_is_packed_whole_is_run(here: Here) -> None:
    here.refuses("none/shuntyard_conformance is missing", "run", "none", "out")
    here.runner("exit 0")
    (here.place / "packed/timing.bin.gz").write_text("")
    here.refuses("timing.bin.gz is missing", "run", "packed", "out")
    (here.place / "packed/timing.bin.gz").write_text("half")
    here.refuses("timing.bin.gz is damaged", "run", "packed", "out")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'echo "shuntyard_conformance: there is no CUDA device: no driver" >&2; exit 2',
            "error: there is no CUDA device",
        ),
        (
            'echo "shuntyard_conformance: no such symbol" >&2; exit 2',
            "the runner cannot run here: shuntyard_conformance: no",
        ),
        ('echo "GLIBC_9 not found" >&2; exit 127', "the runner cannot run here: GLIBC_9 not found"),
    ],
)
def test_without_a_device_nothing_is_left(here: Here, text: str, words: str) -> None:
    here.runner(text)
    here.refuses(words, "run", "packed", "out")


def test_a_run(here: Here) -> None:
    here.runner('echo "$(cat) $*"')
    (here.place / "file").write_text("")
    here.refuses("file cannot be written", "run", "packed", "file")
    status, text, said = here.run("run", "packed", "out/below")
    assert (status, said) == (0, ""), text
    out = here.place / "out/below"
    names = {"machine", "cases", "shifted", "plain", "timing", "tactics", "sanitizer"}
    assert {path.name for path in out.iterdir()} == {f"{name}.txt" for name in names}
    library = here.place / "packed/libshuntyard_plugins.so"
    assert (out / "shifted.txt").read_text() == f"plain {library} - --shift 4\n"
    program(here.bin / "compute-sanitizer", 'echo "$*"; cat >/dev/null; exit 9')
    assert here.run("run", "packed", "watched")[0] == 1
    watched = (here.place / "watched/racecheck.txt").read_text()
    assert "--tool racecheck" in watched and watched.endswith("\nracecheck: exit status 9\n")


def test_only_what_took_too_long_is_said_to(here: Here) -> None:
    here.runner('case "$*" in *--every\\ *) exit 0 ;; *--shift*) exit 124 ;; *--time*) kill -9 $$ ;; *) exit 1 ;; esac')
    status, text, _ = here.run("run", "packed", "out")
    assert status == 1
    said = [line for line in text.splitlines() if "exit status" in line]
    assert said == [
        "cases: exit status 1",
        "shifted: exit status 124: it took longer than 30 s",
        "plain: exit status 1",
        "timing: exit status 137",
        "tactics: exit status 137",
    ]


def test_usage(here: Here) -> None:
    status, text, said = here.run("--help")
    assert (status, said) == (0, "") and "bench/device.sh pack DIR" in text and "if it could not run." in text
    for arguments in ((), ("pack",), ("run", "packed"), ("pack", "a", "b"), ("other", "a")):
        assert here.run(*arguments) == (2, "", text)
