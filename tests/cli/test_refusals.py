"""Bad input gets one line that names it, a hint, exit status 3, no traceback, and no output."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from safetensors.torch import load_file, save_file

from shuntyard.cli import main
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint

RAW = raw_config()
NORM = "model.layers.0.input_layernorm.weight"
EXPERTS = "model.layers.1.feed_forward.experts.down_proj"
SHARD = "model-00002-of-00003.safetensors"


def shuntyard(*arguments: str | Path) -> Result:
    """The command in this process: the same code, without waiting for imports."""
    return CliRunner().invoke(main, [str(a) for a in arguments])


def refused(result: Result, *parts: str) -> None:
    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    lines = result.stderr.strip().splitlines()
    assert "Traceback" not in result.stderr
    errors = [line for line in lines if line.startswith("error: ")]
    hints = [line for line in lines if line.startswith("hint: ")]
    assert len(errors) == len(hints) == 1, lines
    assert lines[-2:] == [errors[0], hints[0]]
    for part in parts:
        assert part in errors[0], errors[0]


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A sound checkpoint in three shards, to be spoiled."""
    return write_checkpoint(tmp_path / "checkpoint", RAW, random_weights(parsed(RAW)), shards=3)


def edit_config(own: Path, **changes: Any) -> None:
    path = own / "config.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | changes).items() if v is not ...}))


def edit_tensor(own: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    index = json.loads((own / "model.safetensors.index.json").read_text())
    file = own / index["weight_map"][name]
    tensors = load_file(file)
    changed = change(tensors.pop(name))
    if changed is None:
        del index["weight_map"][name]
        (own / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        tensors[name] = changed
    save_file(tensors, file)


def edit_header(own: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = (own / SHARD).read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    (own / SHARD).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def dense_llama(own: Path) -> None:
    edit_config(own, model_type="llama", architectures=["LlamaForCausalLM"])


def missing(own: Path) -> None:
    edit_tensor(own, NORM, lambda tensor: None)


def extra(own: Path) -> None:
    name = "model.layers.0.self_attn.q_norm.weight"
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    file = own / "model-00001-of-00003.safetensors"
    save_file({**load_file(file), name: torch.ones(8)}, file)


def misshaped(own: Path) -> None:
    edit_tensor(own, EXPERTS, lambda tensor: tensor.transpose(1, 2).contiguous())


def wrong_dtype(own: Path) -> None:
    edit_tensor(own, NORM, lambda tensor: tensor.to(torch.float8_e4m3fn))


def integer_weights(own: Path) -> None:
    edit_tensor(own, EXPERTS, lambda tensor: tensor.to(torch.int32))


def truncated(own: Path) -> None:
    with (own / SHARD).open("rb+") as stream:
        stream.truncate((own / SHARD).stat().st_size - 1000)


def cut_in_the_header(own: Path) -> None:
    with (own / SHARD).open("rb+") as stream:
        stream.truncate(100)


def lying_offsets(own: Path) -> None:
    def swap(header: dict[str, Any]) -> None:
        names = [n for n in header if n != "__metadata__"]
        first = header[names[0]]["data_offsets"]
        first[0], first[1] = first[0] + 4, first[1] + 4

    edit_header(own, swap)


def lying_shape(own: Path) -> None:
    def grow(header: dict[str, Any]) -> None:
        name = next(n for n in header if n != "__metadata__")
        header[name]["shape"] = [2, *header[name]["shape"]]

    edit_header(own, grow)


def lying_size(own: Path) -> None:
    def far(header: dict[str, Any]) -> None:
        name = next(n for n in header if n != "__metadata__")
        header[name]["data_offsets"][1] += 10**12

    edit_header(own, far)


def missing_shard(own: Path) -> None:
    (own / SHARD).unlink()


def missing_index(own: Path) -> None:
    (own / "model.safetensors.index.json").unlink()


def missing_config(own: Path) -> None:
    (own / "config.json").unlink()


def unknown_rope(own: Path) -> None:
    edit_config(own, rope_parameters={"rope_type": "yarn", "factor": 2.0, "rope_theta": 10000.0})


def unknown_key(own: Path) -> None:
    edit_config(own, attention_sinks=4)


def quantized(own: Path) -> None:
    edit_config(own, quantization_config={"quant_method": "fbgemm_fp8"})


def vision(own: Path) -> None:
    edit_config(own, model_type="llama4", architectures=["Llama4ForConditionalGeneration"])


SPOILED: dict[Callable[[Path], None], tuple[str, ...]] = {
    dense_llama: ("config.json", "model_type 'llama' is not supported"),
    vision: ("config.json", "config key 'attention_chunk_size' is not understood beside text_config"),
    missing: (f"tensor '{NORM}' is missing",),
    extra: ("model-00001-of-00003.safetensors", "'model.layers.0.self_attn.q_norm.weight' is not understood"),
    misshaped: (f"tensor '{EXPERTS}' has shape [4, 32, 24], config.json asks for [4, 24, 32]",),
    wrong_dtype: (f"tensor '{NORM}' is F8_E4M3, but is no Linear and no expert: it must be plain",),
    integer_weights: (f"tensor '{EXPERTS}' is I32",),
    truncated: (SHARD, "lie outside the file's"),
    cut_in_the_header: (SHARD, "cannot hold the header that it announces"),
    lying_offsets: (SHARD, "leaves a hole before it"),
    lying_shape: (SHARD, "bits, but data_offsets give it"),
    lying_size: (SHARD, "lie outside the file's"),
    missing_shard: (SHARD, "no such file"),
    missing_index: ("has model-00001-of-00003.safetensors but neither",),
    missing_config: ("config.json: no such file",),
    unknown_rope: ("config.json", "rope type 'yarn' is not supported"),
    unknown_key: ("config.json", "config key 'attention_sinks' is not understood"),
    quantized: ("config.json", "quant_method 'fbgemm_fp8'"),
}


@pytest.mark.parametrize("spoil", SPOILED, ids=lambda spoil: spoil.__name__)
def test_spoiled_checkpoint(spoil: Callable[[Path], None], own: Path, tmp_path: Path) -> None:
    spoil(own)
    before = sorted(tmp_path.rglob("*"))
    refused(shuntyard("export", own, tmp_path / "out"), str(own), *SPOILED[spoil])
    refused(shuntyard("inspect", own), *SPOILED[spoil])
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(own: Path, tmp_path: Path, value: float) -> None:
    def poison(tensor: torch.Tensor) -> torch.Tensor:
        tensor[1, 2, 3] = value
        return tensor

    edit_tensor(own, EXPERTS, poison)
    message = f"tensor '{EXPERTS}' at [1, 2, 3] holds {value}, which is not finite"
    refused(shuntyard("export", own, tmp_path / "out", "--check-values"), message)
    assert not (tmp_path / "out").exists()
    assert shuntyard("export", own, tmp_path / "out").exit_code == 0  # headers alone are read
    refused(shuntyard("build", tmp_path / "out", tmp_path / "engine"), message)
    assert not (tmp_path / "engine").exists()


def test_no_checkpoint_at_all(tmp_path: Path) -> None:
    refused(shuntyard("export", tmp_path / "nowhere", tmp_path / "out"), "nowhere: no such directory")
    (tmp_path / "empty").mkdir()
    refused(shuntyard("export", tmp_path / "empty", tmp_path / "out"), "config.json: no such file")
    (tmp_path / "file").write_text("")
    refused(shuntyard("export", tmp_path / "file", tmp_path / "out"), "file: is no directory")


def test_an_output_that_exists(own: Path, tmp_path: Path, model_directory: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "precious").write_text("kept")
    refused(shuntyard("export", own, taken), "taken: exists already")
    refused(shuntyard("build", model_directory, taken), "taken: exists already")
    refused(shuntyard("demo", taken), "taken: exists already")
    dangling = tmp_path / "dangling"
    dangling.symlink_to(tmp_path / "nowhere")
    refused(shuntyard("export", own, dangling), "dangling: exists already")
    assert [p.read_text() for p in taken.iterdir()] == ["kept"]
    assert not (tmp_path / "nowhere").exists()


def test_an_output_inside_a_file(own: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    refused(shuntyard("export", own, tmp_path / "file" / "out"), "out: cannot be written: Not a directory")
    assert (tmp_path / "file").read_text() == "kept"


def test_validation_that_cannot_be_made(engine_directory: Path, checkpoint: Path, tmp_path: Path) -> None:
    refused(
        shuntyard("validate", engine_directory, "--reference", checkpoint, "--text", tmp_path / "nowhere.txt"),
        "nowhere.txt: no such file",
    )
    (tmp_path / "latin").write_bytes("naïve".encode("latin-1"))
    refused(
        shuntyard("validate", engine_directory, "--reference", checkpoint, "--text", tmp_path / "latin"),
        "latin: cannot be read as UTF-8 text",
    )
    refused(shuntyard("validate", engine_directory, "--reference", checkpoint), "tokenizer.json: no such file")
    refused(shuntyard("validate", tmp_path, "--reference", checkpoint), "is a checkpoint, not an engine")


def test_prompts_need_a_tokenizer(engine_directory: Path) -> None:
    refused(shuntyard("run", engine_directory, "--prompt", "x"), "tokenizer.json: no such file")


def test_bf16_on_the_cpu(model_directory: Path, tmp_path: Path) -> None:
    refused(shuntyard("build", model_directory, tmp_path / "engine", "--dtype", "bf16"), "cannot compute in bf16")


def test_directories_of_the_wrong_kind(
    checkpoint: Path, model_directory: Path, engine_directory: Path, tmp_path: Path
) -> None:
    refused(shuntyard("run", model_directory, "--prompt", "x"), "is a model directory, not an engine")
    refused(shuntyard("build", engine_directory, tmp_path / "out"), "is not a model directory")
    refused(shuntyard("build", checkpoint, tmp_path / "out"), "is a checkpoint, not a model directory")


def test_files_that_cannot_be_read(own: Path, tmp_path: Path) -> None:
    (own / SHARD).unlink()
    (own / SHARD).mkdir()
    refused(shuntyard("export", own, tmp_path / "out"), SHARD, "is no regular file")


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = shuntyard("--debug", "export", tmp_path / "nowhere", tmp_path / "out")
    assert result.exit_code == 3
    assert "Traceback" in result.stderr
    assert "CheckpointError" in result.stderr
    assert result.stderr.splitlines()[-2].startswith("error: ")


def test_usage_errors_are_clicks(tmp_path: Path) -> None:
    assert shuntyard("export", tmp_path).exit_code == 2
    assert shuntyard("build", tmp_path, tmp_path / "x", "--backend", "openvino").exit_code == 2
    assert shuntyard("nonsense").exit_code == 2


def test_a_sound_checkpoint_passes(own: Path, tmp_path: Path) -> None:
    """So each of the above is refused for what was done to it."""
    result = shuntyard("export", own, tmp_path / "out", "--check-values", "--json")
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    assert facts["waived"] == []
    assert facts["bytes_linked"] == sum(p.stat().st_size for p in own.glob("*.safetensors"))
    shutil.rmtree(own)
    assert shuntyard("inspect", tmp_path / "out").exit_code == 0


def test_messages_are_one_line_whatever_a_name_holds(own: Path, tmp_path: Path) -> None:
    name = "model.layers.0.odd\nname\x1b[31m"
    index = json.loads((own / "model.safetensors.index.json").read_text())
    index["weight_map"][name] = "model-00001-of-00003.safetensors"
    (own / "model.safetensors.index.json").write_text(json.dumps(index))
    file = own / "model-00001-of-00003.safetensors"
    save_file({**load_file(file), name: torch.ones(8)}, file)
    result = shuntyard("export", own, tmp_path / "out")
    refused(result, "is not understood")
    assert "\x1b[31m" not in result.stderr
    assert np.array([ord(c) >= 32 or c == "\n" for c in result.stderr]).all()
