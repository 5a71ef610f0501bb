"""Exporting Llama 4 to ONNX: shuntyard against everybody else who might, on the same checkpoints.

Each contender exports each checkpoint in a process of its own, killed at a limit of memory or time. What it wrote is
judged by ``bench/verdict.py``: *right* (transformers' logits, three chunks long), *refused* (it said no), *failed* (it
crashed), *wrong* (it said that all went well), *stopped* (at a limit), *whole* (too large to run here: every parameter
is there, at its place in the checkpoint's own files). Small checkpoints are random; those of full size are sparse.

Peers run in environments of their own: ``python bench/peers/environments.py DIR``, then ``--peers DIR``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, pre_tokenizers

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import timing
from bench.checkpoint import config_of_about, write_checkpoint
from bench.peers import PEERS, Peer
from bench.process import Limits, Outcome, run, written_bytes
from bench.verdict import checkpoint_parameters, whole
from tests.sizes import MODELS, VISION, raw_config, tensors_of, text_config
from tests.sparse import fill, write_sparse

HERE = Path(__file__).resolve().parent
OURS = "shuntyard"

NESTED_TEXT = text_config(
    attention_chunk_size=64,
    bos_token_id=0,
    eos_token_id=1,
    floor_scale=32,
    head_dim=64,
    hidden_size=256,
    intermediate_size=512,
    intermediate_size_mlp=1024,
    max_position_embeddings=8192,
    num_attention_heads=4,
    num_hidden_layers=4,
    num_key_value_heads=1,
    pad_token_id=0,
    rope_scaling={
        "factor": 16.0,
        "high_freq_factor": 1.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
    vocab_size=8192,
)
NESTED_VISION = VISION | {
    "hidden_size": 64,
    "image_size": 56,
    "intermediate_size": 256,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "projector_input_dim": 128,
    "projector_output_dim": 128,
    "vision_output_dim": 128,
}

REFUSAL = re.compile(r"NotImplementedError|unsupported architecture|not (currently |yet )?supported|Unknown model_type")
"""How tools say that Llama 4 is not for them; any other end with an error is a failure."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to export. ``runs``: small enough that its graph is run and compared."""

    what: str
    write: Callable[[Path], Any]
    nested: bool
    runs: bool


def _write_nested(out: Path) -> None:
    raw = raw_config(NESTED_TEXT, "bf16", NESTED_VISION)
    write_sparse(out, raw)
    fill(out, tensors_of(raw))


def _random(about: int) -> Callable[[Path], Any]:
    import torch

    return lambda out: write_checkpoint(out, config_of_about(about), torch.bfloat16)


def _sparse(model: str) -> Callable[[Path], Any]:
    return lambda out: write_sparse(out, raw_config(MODELS[model], "bf16"))


SUBJECTS = {
    "small": Subject("8 layers, MoE in every second one", _random(20_000_000), nested=False, runs=True),
    "nested": Subject("4 MoE layers, vision tower, the Hub's layout", _write_nested, nested=True, runs=True),
    "500M": Subject("8 layers, MoE in every second one", _random(500_000_000), nested=False, runs=True),
    "scout": Subject("Scout, full size, sparse", _sparse("scout"), nested=True, runs=False),
    "maverick": Subject("Maverick, full size, sparse", _sparse("maverick"), nested=True, runs=False),
}


def add_text_files(checkpoint: Path) -> None:
    """A small tokenizer and a chat template, which some peers ask for."""
    words = {f"w{i}": i for i in range(1000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    special = {"unk_token": "w0", "bos_token": "w0", "eos_token": "w1", "pad_token": "w0"}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (checkpoint / "chat_template.jinja").write_text(template, encoding="utf-8")


def prepare(work: Path, name: str) -> Path:
    """The checkpoint ``name`` under ``work``; what is there already is used."""
    checkpoint = work / "checkpoints" / name
    if not checkpoint.exists():
        partial = checkpoint.with_name(f"{name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        SUBJECTS[name].write(partial)
        add_text_files(partial)
        partial.rename(checkpoint)
    return checkpoint


def cause(log: str) -> str:
    """The line of a log that says why it ended: the first of torch's summary, the last error, or the last line."""
    lines = [re.sub(r"\x1b\[[0-9;]*m", "", line).strip() for line in log.splitlines() if line.strip()]
    summary = [line.split("'>: ", 1)[1] for line in lines if re.match(r"<class '[\w.]+'>: ", line)]
    named = [line for line in lines if re.match(r"error:|[\w.]*(Error|Exception)\b", line)]
    return (summary[:1] or named[-1:] or lines[-1:] or [""])[0][:240]


def judge(subject: str, checkpoint: Path, out: Path, work: Path, environment: dict[str, str]) -> dict[str, Any]:
    """The verdict on an export that ended well, in a process of its own."""
    if not SUBJECTS[subject].runs:
        return whole(checkpoint, out)
    kept = work / f"reference-{subject}.npy"
    command = [sys.executable, str(HERE / "verdict.py"), str(checkpoint), str(out), "--reference", str(kept)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"the judge itself failed on {out}:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def ended_badly(outcome: Outcome, log: Path, limits: Limits) -> dict[str, Any] | None:
    """The verdict on an export that did not say that it went well."""
    if outcome.stopped == "memory":
        return {"verdict": "stopped", "evidence": f"passed {limits.memory_mib / 1024:.0f} GiB of memory"}
    if outcome.status == -signal.SIGKILL and outcome.stopped is None:
        return {"verdict": "stopped", "evidence": f"killed from outside, at {outcome.peak_mib:,.0f} MiB"}
    if outcome.stopped == "time":
        return {"verdict": "stopped", "evidence": f"passed {limits.seconds / 60:.0f} minutes"}
    if outcome.status:
        text = log.read_text(errors="replace")
        return {"verdict": "refused" if REFUSAL.search(text) else "failed", "evidence": cause(text)}
    return None


@dataclass(frozen=True)
class Contender:
    """Somebody who exports; ``command`` is empty where it is not installed."""

    name: str
    version: str
    command: tuple[str, ...]
    telling: str = ""


def compete(contender: Contender, subject: str, args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """One contender on one checkpoint."""
    name = contender.name
    limits = Limits(args.memory * 1024, args.minutes * 60)
    checkpoint = prepare(work, subject)
    label = re.sub(r"\W+", "-", f"{subject} {name}")
    log = work / "logs" / f"{label}.log"
    log.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{label}-") as folder:
        temporary = Path(folder) / "tmp"
        temporary.mkdir()
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary)}
        out = Path(folder) / "out"
        command = [part.format(checkpoint=checkpoint, out=out) for part in contender.command]
        if name == OURS and SUBJECTS[subject].nested:
            command.append("--text-only")
        outcome = run(command, log, limits, environment)
        verdict = ended_badly(outcome, log, limits)
        written = written_bytes(Path(folder), checkpoint)
        if verdict is None:
            verdict = judge(subject, checkpoint, out, work, environment)
    if contender.telling and verdict["verdict"] == "wrong":
        said = re.search(contender.telling, log.read_text(errors="replace"))
        verdict["evidence"] += f"; its log: {said[0]}" if said else ""
    verdict["evidence"] = verdict["evidence"].replace(f"{checkpoint}", "CHECKPOINT").replace(folder, "OUT")
    row = {"contender": name, "version": contender.version, "subject": subject}
    return {**row, **outcome.as_dict(), "written_bytes": written, **verdict}


def interpreter(peer: Peer, environments: Path | None) -> Path | None:
    """The Python that has what a peer needs, or nothing."""
    if not peer.packages:
        return Path(sys.executable)
    python = environments / peer.environment / "bin" / "python" if environments else None
    return python if python and python.exists() else None


def version_of(python: Path, package: str) -> str:
    """The version of a package in an environment."""
    code = f"import importlib.metadata as m; print(m.version({package!r}))"
    return subprocess.run([str(python), "-c", code], check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def contenders(args: argparse.Namespace) -> list[Contender]:
    """Everybody, or those whom ``--only`` names."""
    ours = (sys.executable, "-m", "shuntyard.cli", "export", "{checkpoint}", "{out}")
    found = [Contender(OURS, importlib.metadata.version("shuntyard"), ours)]
    for peer in PEERS:
        python = interpreter(peer, args.peers)
        package = peer.packages[0] if peer.packages else peer.name.split(".")[0].split()[0]
        version = version_of(python, package.split("==")[0]) if python else package.split("==")[1]
        command = peer.command(python, Path("{checkpoint}"), Path("{out}")) if python else []
        found.append(Contender(peer.name, version, tuple(command), peer.telling))
    return [one for one in found if not args.only or any(word in one.name for word in args.only)]


def missing(contender: Contender, subject: str) -> dict[str, Any]:
    """The row of a peer that is not installed."""
    packages = next(peer.packages for peer in PEERS if peer.name == contender.name)
    row = {"contender": contender.name, "version": contender.version, "subject": subject}
    return {**row, "verdict": "not installed", "evidence": f"pip install {packages[0]}"}


def measure(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Everybody on everything, as one JSON-ready record."""
    everybody = contenders(args)
    for python in {one.command[0] for one in everybody if one.command}:
        # Nobody pays for the first reading of torch's files.
        subprocess.run([python, "-c", "import onnxscript, torch, transformers"], stderr=subprocess.DEVNULL)
    neighbours = timing.Neighbours()
    results = []
    for subject in args.checkpoints:
        for contender in everybody:
            print(f"{subject}: {contender.name} ...", file=sys.stderr, flush=True)
            found = compete(contender, subject, args, work) if contender.command else missing(contender, subject)
            results.append(found)
    parameters = {name: checkpoint_parameters(prepare(work, name)) for name in args.checkpoints}
    return {
        "what": "export to ONNX",
        "machine": timing.machine(os.cpu_count() or 1) | {"cpu_share_of_others": neighbours.share()},
        "limits": {"memory_gib": args.memory, "minutes": args.minutes},
        "subjects": {name: {"what": SUBJECTS[name].what, "text_parameters": parameters[name]} for name in parameters},
        "results": results,
    }


def print_table(result: dict[str, Any]) -> None:
    """A row a contender and checkpoint."""
    console = Console(width=200)
    colours = {"right": "green", "whole": "green", "wrong": "bold red", "failed": "yellow", "stopped": "yellow"}
    for subject, facts in result["subjects"].items():
        table = Table(title=f"{subject}: {facts['what']}, {facts['text_parameters']:,} parameters of text")
        for column, right in (("contender", 0), ("s", 1), ("peak MiB", 1), ("MB written", 1), ("exit", 1)):
            table.add_column(column, justify="right" if right else "left", no_wrap=True)
        table.add_column("verdict")
        table.add_column("evidence", overflow="fold")
        for row in (row for row in result["results"] if row["subject"] == subject):
            numbers = ["", "", "", ""]
            if "seconds" in row:
                written = f"{row['written_bytes'] / 1e6:,.1f}"
                numbers = [f"{row['seconds']:.1f}", f"{row['peak_mib']:,.0f}", written, str(row["status"])]
            verdict = f"[{colours.get(row['verdict'], 'default')}]{row['verdict']}"
            evidence = row["evidence"].replace("[", r"\[")
            table.add_row(f"{row['contender']} {row['version']}", *numbers, verdict, evidence)
        console.print(table)


def verdict(result: dict[str, Any]) -> bool:
    """The claim: ours are right, or whole where they are too large to run."""
    failures = [
        f"{row['subject']}: ours is {row['verdict']}: {row['evidence']}"
        for row in result["results"]
        if row["contender"] == OURS and row["verdict"] not in ("right", "whole")
    ]
    for failure in failures:
        print(f"FAIL: {failure}")
    if not failures:
        print("ok: every export of ours is right, or whole where it is too large to run")
    return not failures


def main() -> None:
    """The command line. Exit status 1: an export of ours is not right."""
    parser = argparse.ArgumentParser(description="Exporting to ONNX: shuntyard against its peers.")
    parser.add_argument("--work", type=Path, help="keeps what is made there  [default: a temporary directory]")
    parser.add_argument("--peers", type=Path, help="where bench/peers/environments.py made the peers' environments")
    parser.add_argument("--checkpoints", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--only", nargs="+", help="contenders whose name holds one of these words")
    parser.add_argument("--memory", type=float, default=14, help="GiB a contender may take (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=10, help="time a contender may take (default: %(default)s)")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.peers = args.peers and args.peers.resolve()
    with tempfile.TemporaryDirectory() as temporary:
        work = (args.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        result = measure(args, work)
    print_table(result)
    timing.write_json(args.json, result)
    sys.exit(not verdict(result))


if __name__ == "__main__":
    main()
