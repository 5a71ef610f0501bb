"""Memory of layer-by-layer validation: a checkpoint of 12 GB, exported and validated in a third of that and less.

Writes a random bf16 checkpoint of 44 layers (dense and MoE in turn, every 4th without RoPE), each of about half a
gigabyte in fp32, exports it, and holds the graph to transformers, both layer by layer from disk:
``shuntyard validate graph:MODEL --reference CKPT --by-layers``. Each command runs in a process of its own under
``RLIMIT_DATA``, with which the kernel refuses private writable memory beyond a limit (maps of files do not count there,
but for writable ones). Then the weights of key and value of one layer are exchanged in the graph: it must be found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
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
WRONG = 18
"""The layer that the fault is planted in."""
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


def write_tokens(path: Path) -> None:
    """Sequences of random tokens, as ``--tokens`` takes them."""
    import numpy as np

    random = np.random.default_rng(0)
    vocabulary = config()["vocab_size"]
    rows = [random.integers(0, vocabulary, TOKENS).tolist() for _ in range(SEQUENCES)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def plant(model: Path, out: Path) -> str:
    """A model directory whose layer ``WRONG`` has the weights of key and value exchanged, in its graph; its module."""
    import onnx_ir as ir

    from shuntyard.exporter.export import MANIFEST_NAME, MODEL_NAME

    shutil.copytree(model, out, copy_function=os.link)
    graph = ir.load(model / MODEL_NAME)
    names = [f"model.layers.{WRONG}.self_attn.{name}_proj.weight" for name in "kv"]
    key, value = (graph.graph.initializers[name] for name in names)
    key.const_value, value.const_value = value.const_value, key.const_value
    for name in (MODEL_NAME, MANIFEST_NAME):
        (out / name).unlink()
    ir.save(graph, out / MODEL_NAME)
    manifest = json.loads((model / MANIFEST_NAME).read_text())
    manifest["graph_sha256"] = hashlib.sha256((out / MODEL_NAME).read_bytes()).hexdigest()
    (out / MANIFEST_NAME).write_text(json.dumps(manifest))
    return f"model.layers.{WRONG}.self_attn.key"


def run(work: Path, data_mib: int, *words: str) -> dict[str, Any]:
    """A shuntyard command's outcome, with its JSON; the limit holds from before torch is there."""
    out, log = work / "stdout.json", work / "stderr.log"
    limit = f"ulimit -d {data_mib * 1024}; " if data_mib else ""
    script = f'{limit}exec "$0" -m shuntyard.cli "$@" > {out}'
    command = ["bash", "-c", script, sys.executable, *words, "--json"]
    environment = os.environ | {"TMPDIR": str(work), "HF_HUB_OFFLINE": "1"}
    outcome = process.run(command, log, LIMITS, environment).as_dict() | {"command": words[0], "data_mib": data_mib}
    if outcome["status"] not in (0, 1):
        return outcome | {"failed": log.read_text(errors="replace")[-600:]}
    return outcome | {"report": json.loads(out.read_text())}


def row(outcome: dict[str, Any]) -> dict[str, Any]:
    """What is kept of a validation."""
    report = outcome.pop("report", {})
    modules = report.get("modules", [])
    worst = max(
        (max(m[k] / m[f"{k}_bound"] for k in ("relative", "coordinate")) for m in modules if m["mode"] == "forced"),
        default=None,
    )
    told = {key: report.get(key) for key in ("passed", "culprit", "tokens")}
    return outcome | told | {"modules": len(modules), "worst_by_bound": worst}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="written there, if it does not exist, and kept")
    parser.add_argument("--data-mib", type=int, default=4096, help="RLIMIT_DATA (default %(default)s)")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="layered-", dir=args.checkpoint and args.checkpoint.parent) as folder:
        work = Path(folder)
        checkpoint = args.checkpoint or work / "checkpoint"
        nbytes = prepare(checkpoint)
        print(f"{checkpoint}: {nbytes / 1e9:.1f} GB of bf16, {2 * nbytes / 1e9:.1f} GB in fp32", flush=True)
        write_tokens(work / "tokens.jsonl")
        rows = [run(work, args.data_mib, "export", str(checkpoint), str(work / "model"))]
        rows[0].pop("report", None)
        wrong = plant(work / "model", work / "wrong")
        common = ("--reference", str(checkpoint), "--tokens", str(work / "tokens.jsonl"), "--by-layers")
        cache = ("--cache", str(work / "cache"))
        for model, more in (("model", ()), ("model", cache), ("wrong", cache)):
            rows.append(row(run(work, args.data_mib, "validate", f"graph:{work / model}", *common, *more)))
            print(json.dumps(rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"bytes": nbytes, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    right = [r["status"] for r in rows] == [0, 0, 0, 1] and rows[-1]["culprit"] == wrong
    fits = all(r["peak_mib"] <= args.data_mib for r in rows)
    print("right, and within the limit" if right and fits else "NOT as it should be")
    sys.exit(not (right and fits))


if __name__ == "__main__":
    main()
