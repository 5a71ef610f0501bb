"""Is an export right? One judge for all: its graph in ONNX Runtime against transformers, fp32, three chunks of tokens.

``python bench/verdict.py CHECKPOINT OUT`` prints one JSON line. What shuntyard wrote is built into an engine and run
through its public interface; any other graph is opened as it is, its ``input_ids`` fed, its first output compared.
Before that, parameters are counted: a graph that holds fewer than the checkpoint's text model cannot be right.

A model too large to run is judged by :func:`whole`: does its graph refer to every byte of the checkpoint's text model?
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.sparse import Place, places

TOLERANCE = 1e-3
"""fp32 in another order of summation, on logits of a few units; the mildest mistake known moves them by 2."""

CHUNKS = 3
WHOLE = 0.999
"""Exporters fold and transpose, but a share of parameters below this means that some are gone."""

Tokens = NDArray[np.int64]
Floats = NDArray[np.float32]


def text_config(checkpoint: Path) -> dict[str, Any]:
    """The text model's part of ``config.json``."""
    raw: dict[str, Any] = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    nested: dict[str, Any] = raw.get("text_config", raw)
    return nested


def prompt(checkpoint: Path) -> Tokens:
    """The same tokens for everybody, three chunks of them."""
    text = text_config(checkpoint)
    vocabulary, chunk = int(text["vocab_size"]), int(text["attention_chunk_size"])
    return np.random.default_rng(0).integers(0, vocabulary, CHUNKS * chunk, dtype=np.int64)


def reference(checkpoint: Path, file: Path) -> Floats:
    """transformers' logits ``[S, V]``, eager attention, kept in ``file``."""
    if not file.exists():
        import torch
        from transformers import Llama4ForCausalLM

        model = Llama4ForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.inference_mode():
            logits = model(torch.from_numpy(prompt(checkpoint))[None], use_cache=False).logits[0]
        np.save(file, logits.numpy())
    found: Floats = np.load(file)
    return found


def text_places(checkpoint: Path) -> dict[str, Place]:
    """Where the text model's tensors lie."""
    outside = ("vision_model.", "multi_modal_projector.")
    return {name: place for name, place in places(checkpoint).items() if not name.startswith(outside)}


def is_weight(name: str) -> bool:
    """Whether a tensor holds parameters, not a quantization's scales."""
    return not name.endswith("_scale")


def checkpoint_parameters(checkpoint: Path) -> int:
    """Parameters of the text model, by the headers."""
    return sum(math.prod(place.tensor.shape) for name, place in text_places(checkpoint).items() if is_weight(name))


def constants(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Every tensor that a graph holds, in its branches too."""
    yield from graph.initializer
    yield from node_constants(graph.node)


def node_constants(nodes: Any) -> Iterator[onnx.TensorProto]:
    """Tensors in the attributes of nodes."""
    for node in nodes:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                yield attribute.t
            if attribute.HasField("g"):
                yield from constants(attribute.g)


def graph_parameters(out: Path, graphs: list[Path], checkpoint: Path) -> int:
    """Numbers that the graphs hold, and those that lie beside them in ``.safetensors`` files of their own."""
    count = 0
    for file in graphs:
        model = onnx.load(file, load_external_data=False)
        count += sum(math.prod(tensor.dims) for tensor in constants(model.graph))
        for function in model.functions:
            count += sum(math.prod(tensor.dims) for tensor in node_constants(function.node))
    theirs = {(s.st_dev, s.st_ino) for s in (path.stat() for path in checkpoint.glob("*.safetensors"))}
    for folder in {path.parent for path in out.rglob("*.safetensors")}:
        own = {p.name for p in folder.glob("*.safetensors") if (p.stat().st_dev, p.stat().st_ino) not in theirs}
        count += sum(math.prod(p.tensor.shape) for p in places(folder).values() if p.file.name in own)
    return count


def run_shuntyard(out: Path, tokens: Tokens) -> tuple[Floats, float]:
    """Logits ``[S, V]`` of a model directory through an engine for the CPU; seconds."""
    from shuntyard.engines import open_engine

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        engine = Path(folder) / "engine"
        command = [sys.executable, "-m", "shuntyard.cli", "build", str(out), str(engine), "--max-batch", "1"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        opened = open_engine(engine)
        begin = time.perf_counter()
        logits: Floats = opened.logits(tokens[None])[0]
        return logits, time.perf_counter() - begin


def run_graph(file: Path, tokens: Tokens) -> tuple[Floats, float]:
    """Logits ``[S, V]`` of any other graph; seconds."""
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    known = {
        "input_ids": tokens[None],
        "attention_mask": np.ones((1, len(tokens)), np.int64),
        "position_ids": np.arange(len(tokens))[None],
    }
    names = [argument.name for argument in session.get_inputs()]
    strange = [name for name in names if name not in known]
    if strange:
        raise ValueError(f"asks for '{strange[0]}'")
    begin = time.perf_counter()
    logits = session.run(None, {name: known[name] for name in names})[0]
    spent = time.perf_counter() - begin
    return logits[0].astype(np.float32), spent


def one_line(error: BaseException) -> str:
    """What went wrong, short."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


def counted(checkpoint: Path, out: Path, graphs: list[Path]) -> dict[str, Any] | None:
    """The verdict where parameters are missing; nothing where all seem to be there."""
    if not graphs:
        return {"verdict": "wrong", "evidence": "no ONNX file"}
    expected, found = checkpoint_parameters(checkpoint), graph_parameters(out, graphs, checkpoint)
    if found >= WHOLE * expected:
        return None
    evidence = f"holds {found:,} of {expected:,} parameters ({found / expected:.0%})"
    return {"verdict": "wrong", "evidence": evidence, "parameters": found, "checkpoint_parameters": expected}


def judge(checkpoint: Path, out: Path, kept: Path) -> dict[str, Any]:
    """The verdict on an export that said it went well, with evidence."""
    graphs = sorted(out.rglob("*.onnx"))
    lacking = counted(checkpoint, out, graphs)
    if lacking:
        return lacking
    facts: dict[str, Any] = {"checkpoint_parameters": checkpoint_parameters(checkpoint)}
    tokens = prompt(checkpoint)
    try:
        ours = (out / "shuntyard.json").exists()
        logits, seconds = run_shuntyard(out, tokens) if ours else run_graph(graphs[0], tokens)
    except Exception as error:  # noqa: BLE001  whatever a foreign graph does, it is a finding
        return {"verdict": "wrong", "evidence": f"does not run: {one_line(error)}", **facts}
    right = reference(checkpoint, kept)
    if logits.shape != right.shape:
        evidence = f"logits {list(logits.shape)}, should be {list(right.shape)}"
        return {"verdict": "wrong", "evidence": evidence, **facts}
    difference = float(np.abs(logits - right).max())
    facts |= {"max_abs_difference": difference, "run_seconds": seconds, "tokens": len(tokens)}
    # NaN compares false, and must not pass.
    verdict = "right" if difference <= TOLERANCE else "wrong"
    evidence = f"logits differ by up to {difference:.1e} over {len(tokens)} tokens, run in {seconds:.1f} s"
    return {"verdict": verdict, "evidence": evidence, **facts}


def whole(checkpoint: Path, out: Path) -> dict[str, Any]:
    """The verdict where running is out of reach: the graph's weights are the checkpoint's own bytes, all of them.

    An initializer may be a tensor or a part of one; under a tensor's own name it must lie in that tensor. What others
    wrote is only counted.
    """
    if not (out / "shuntyard.json").exists():
        return counted(checkpoint, out, sorted(out.rglob("*.onnx"))) or {
            "verdict": "not judged",
            "evidence": "holds as many parameters as the checkpoint; too large to run here",
        }
    model = onnx.load(out / "model.onnx", load_external_data=False)
    own = text_places(checkpoint)
    by_name = {name.removeprefix("language_model."): place for name, place in own.items()}
    spans: dict[int, list[tuple[int, int]]] = {}
    for tensor in model.graph.initializer:
        place = {entry.key: entry.value for entry in tensor.external_data}
        if not place:
            continue
        inode, begin = (out / place["location"]).stat().st_ino, int(place["offset"])
        spans.setdefault(inode, []).append((begin, begin + int(place["length"])))
        named = by_name.get(tensor.name.removeprefix("language_model."))
        if named and (named.file.stat().st_ino, named.offset) != (inode, begin):
            return {"verdict": "wrong", "evidence": f"'{tensor.name}' lies where the checkpoint has another tensor"}
    for name, (tensor, file, offset) in own.items():
        reached = offset
        for begin, end in sorted(spans.get(file.stat().st_ino, [])):
            if begin <= reached < end:
                reached = end
        if reached < offset + tensor.nbytes and is_weight(name):
            return {"verdict": "wrong", "evidence": f"the graph does not refer to '{name}'"}
    expected = checkpoint_parameters(checkpoint)
    evidence = f"refers to all {expected:,} parameters in the checkpoint's own files; not run"
    return {"verdict": "whole", "evidence": evidence, "checkpoint_parameters": expected}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Judge an ONNX export of a Llama 4 checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--reference", type=Path, required=True, help="file that keeps transformers' logits")
    args = parser.parse_args()
    print(json.dumps(judge(args.checkpoint, args.out, args.reference)))


if __name__ == "__main__":
    main()
