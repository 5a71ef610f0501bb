"""Memory of layer-by-layer validation: a checkpoint of 12 GB, the reference's run over it in a tenth of that.

Writes a random bf16 checkpoint of 44 layers (dense and MoE in turn, every 4th without RoPE), each of about half a
gigabyte in fp32, and runs transformers over a few sequences, layer by layer from disk, in a process of its own. That is
done twice: once to see what it takes, and once with ``RLIMIT_DATA``, under which the kernel refuses private writable
memory beyond the limit. Maps of files do not count there, but for those of the safetensors library, which are writable.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import process
from bench.process import Limits

CHUNK = 16
TOKENS, SEQUENCES = 40, 4
SPARE_BYTES = 4 * 2**30
"""What is left free on the disk, besides the checkpoint; the recording, too, is written there."""

LIMITS = Limits(memory_mib=16 * 1024, seconds=3600)


def config() -> dict[str, Any]:
    """``config.json``: 6 billion parameters, three chunks in 40 tokens."""
    from bench.checkpoint import raw_config

    raw = raw_config(2048)
    rope = {**raw["rope_parameters"], "original_max_position_embeddings": CHUNK}
    return raw | {
        "num_hidden_layers": 44,
        "intermediate_size": 2304,
        "intermediate_size_mlp": 20480,
        "num_local_experts": 8,
        "attention_chunk_size": CHUNK,
        "floor_scale": CHUNK // 2,
        "rope_parameters": rope,
    }


def prepare(checkpoint: Path) -> int:
    """The checkpoint, written where it is not there yet; bytes of its weights."""
    import torch

    from bench.checkpoint import parameters_of, write_checkpoint

    raw = config()
    nbytes = 2 * parameters_of(raw)
    if not checkpoint.exists():
        free = shutil.disk_usage(checkpoint.parent).free
        if free < nbytes + SPARE_BYTES:
            sys.exit(f"{checkpoint.parent}: {nbytes + SPARE_BYTES:,} bytes are needed, {free:,} are free")
        partial = checkpoint.with_name(f"{checkpoint.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_checkpoint(partial, raw, torch.bfloat16)
        partial.rename(checkpoint)
    return nbytes


def be_child(checkpoint: Path, data_mib: int) -> None:
    """Records the reference; prints what it took. The limit holds from before torch is there."""
    if data_mib:
        resource.setrlimit(resource.RLIMIT_DATA, (data_mib * 2**20, data_mib * 2**20))
    import numpy as np

    from shuntyard.validate.record import RecordingKey, cached_recording
    from shuntyard.validate.reference import LayeredReference, reference_label
    from shuntyard.validate.values import Sequence

    random = np.random.default_rng(0)
    vocabulary = config()["vocab_size"]
    sequences = [Sequence(f"random {i}", random.integers(0, vocabulary, TOKENS)) for i in range(SEQUENCES)]
    key = RecordingKey(reference_label(), "fp32", {})
    with cached_recording(lambda: LayeredReference(checkpoint), key, sequences, None, print) as recording:
        finite = all(np.isfinite(logits).all() for logits in recording.logits())
        largest = max(float(np.abs(own.hidden).max()) for own in recording.layer(recording.layers - 1))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    fields = {name: int(status[name].split()[0]) / 1024 for name in ("VmHWM", "VmData")}
    print(json.dumps({"finite": finite, "largest": largest, **fields}))


def run_child(checkpoint: Path, work: Path, data_mib: int) -> dict[str, Any]:
    """The outcome of a child, with what it says itself."""
    log = work / f"child-{data_mib}.log"
    command = [sys.executable, __file__, str(checkpoint), "--child", "--data-mib", str(data_mib)]
    outcome = process.run(command, log, LIMITS, os.environ | {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1"})
    text = log.read_text(errors="replace").splitlines()
    if outcome.status:
        tail = "\n".join(text[-5:])
        return {**outcome.as_dict(), "data_mib": data_mib, "failed": tail}
    return {**outcome.as_dict(), "data_mib": data_mib, **json.loads(text[-1])}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="written there, if it does not exist, and kept")
    parser.add_argument(
        "--data-mib", type=int, default=2048, help="RLIMIT_DATA of the second run (default %(default)s)"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        be_child(args.checkpoint, args.data_mib)
        return
    with tempfile.TemporaryDirectory(prefix="layered-", dir=args.checkpoint and args.checkpoint.parent) as folder:
        work = Path(folder)
        checkpoint = args.checkpoint or work / "checkpoint"
        nbytes = prepare(checkpoint)
        print(f"{checkpoint}: {nbytes / 1e9:.1f} GB of bf16, {2 * nbytes / 1e9:.1f} GB in fp32")
        failed = False
        for data_mib in (0, args.data_mib):
            row = run_child(checkpoint, work, data_mib)
            failed = failed or bool(row["status"]) or not row.get("finite")
            print(json.dumps(row))
    sys.exit(failed)


if __name__ == "__main__":
    main()
