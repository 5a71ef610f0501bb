"""Full disks, places without links, and processes that are killed: outputs appear whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from shuntyard.cli import main
from tests.checkpoints import raw_config, write_checkpoint

RAW = raw_config(num_hidden_layers=1)
COMMAND = [sys.executable, "-m", "shuntyard.cli"]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", RAW, shards=2)


def on_small_disk(tmp_path: Path, kilobytes: int, script: str) -> subprocess.CompletedProcess[str]:
    """Runs a shell script that sees a file system of so many kilobytes at ``$DISK``, in its own mount namespace."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={kilobytes}k none "$DISK" && '
    environment = {**os.environ, "DISK": str(disk), "RUN": " ".join(COMMAND), "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        probe = subprocess.run(["unshare", "-rm", "sh", "-c", mount + "true"], env=environment, capture_output=True)
    except FileNotFoundError:
        pytest.skip("needs the program unshare, for a small file system")
    if probe.returncode != 0:
        pytest.skip(f"no small file system can be mounted here: {probe.stderr.decode().strip()}")
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount + script], env=environment, capture_output=True, text=True, check=False
    )


def test_a_disk_that_fills_up(own: Path, tmp_path: Path) -> None:
    """Links fit, and so does a part of the graph."""
    script = (
        f'cp -r {own} "$DISK/checkpoint"; head -c 8M /dev/zero > "$DISK/filler" 2> /dev/null; '
        'truncate -s -16K "$DISK/filler"; $RUN export "$DISK/checkpoint" "$DISK/out"; echo $?; ls -A "$DISK"'
    )
    done = on_small_disk(tmp_path, 4096, script)
    assert done.stdout.split() == ["3", "checkpoint", "filler"], done.stderr
    assert "out: the disk is full" in done.stderr
    assert "hint: free some space" in done.stderr
    assert "Traceback" not in done.stderr


def test_places_that_cannot_be_linked_to(own: Path, tmp_path: Path) -> None:
    size = sum(p.stat().st_size for p in own.glob("*.safetensors"))
    done = on_small_disk(tmp_path, 4096, f'$RUN export {own} "$DISK/out"; echo $?; ls -A "$DISK"')
    assert done.stdout.split() == ["3"], done.stderr
    assert "cannot be hard-linked into" in done.stderr
    assert f"or give --copy: that copies {size:,} bytes" in done.stderr
    done = on_small_disk(tmp_path, size // 2048, f'$RUN export {own} "$DISK/out" --copy; echo $?; ls -A "$DISK"')
    assert done.stdout.split() == ["3"], done.stderr
    assert f"the copies need {size:,} bytes" in done.stderr
    done = on_small_disk(tmp_path, 4096, f'$RUN export {own} "$DISK/out" --copy >&2; echo $?; ls -A "$DISK/out"')
    assert done.stdout.split()[0] == "0", done.stderr
    assert {"model.onnx", "shuntyard.json", "config.json"} < set(done.stdout.split()[1:])


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda s: s.name)
def test_killed_in_mid_export(own: Path, tmp_path: Path, sign: signal.Signals) -> None:
    out = tmp_path / "out"
    child = subprocess.Popen(
        [*COMMAND, "export", str(own), str(out)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        # A shell lets what it runs in the background ignore interrupts, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.partial-*/*.safetensors")):
        assert child.poll() is None, child.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    child.send_signal(sign)
    said = child.communicate()[1].decode()
    assert child.returncode == (130 if sign == signal.SIGINT else -sign), said
    assert not out.exists()
    left = list(tmp_path.glob(".out.partial-*"))
    assert len(left) == (0 if sign == signal.SIGINT else 1)  # nobody can tidy up after a kill
    result = CliRunner().invoke(main, ["export", str(own), str(out)])
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]  # but the next run does


def test_two_exports_to_one_place(own: Path, tmp_path: Path) -> None:
    """One wins, the other is refused; neither takes the other's unfinished work for abandoned."""
    out = tmp_path / "out"
    children = [
        subprocess.Popen([*COMMAND, "export", str(own), str(out)], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [child.communicate()[1].decode() for child in children]
    assert sorted(child.returncode for child in children) == [0, 3], said
    assert any("out: exists already" in text or "out: appeared meanwhile" in text for text in said)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint", "out"]
