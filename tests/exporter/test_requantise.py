"""Checkpoints that a recipe was carried out on: numbers, scales, and how they declare themselves."""

from __future__ import annotations

import copy
import json
import random
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter import export as exporting
from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.export import ExportResult, export
from shuntyard.exporter.quantise import quantise_matrix
from shuntyard.exporter.recipe import PLAIN, STORED, Precision, Recipe, Resolved, Rule, read_recipe, resolve
from shuntyard.exporter.rewrite_request import Quantize
from shuntyard.validate.dequantise import dequantised_state
from tests import formats
from tests.checkpoints import parsed, random_weights, write_checkpoint
from tests.exporter.exported import OTHER, RAW, WEIGHTS, by_hand, logits, reference
from tests.exporter.handmade import (
    CHANNEL,
    TENSOR,
    Handmade,
    Way,
    data,
    declare_compressed_tensors,
    declare_modelopt,
    handmade,
)
from tests.exporter.handmade import PLAIN as PLAIN_WAY
from tests.exporter.recipes import matrices_of, recipe, rule, tensors_of, write_calibration
from tests.parity.reference import largest_difference
from tests.tolerances import MODEL_MAX_ABS

TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KINDS = list(TORCH.values())


def run(source: Path, out: Path, made: Recipe, **options: Any) -> tuple[ExportResult, list[str]]:
    """Exports; gives the result and what was said."""
    said: list[str] = []
    return export(source, out, recipe=made, report=said.append, **options), said


def resolved(made: Recipe, path: Path) -> Resolved:
    return resolve(made, open_checkpoint(path).config)


def check_values(out: Path, source: Path, found: Resolved) -> None:
    """Each matrix is that of the source, quantised by the definition or rounded to its type; nothing else is there."""
    values = dequantised_state(source)
    plain = dequantised_state(out)
    tensors = tensors_of(out)
    before = {name.removeprefix("language_model."): tensor for name, tensor in tensors_of(source).items()}
    left = set(tensors)
    for own, module, matrix in matrices_of(values):
        asked = found.precision[module]
        if asked.granularity:
            how = Quantize(cast(Literal["tensor", "channel", "group"], asked.granularity), asked.group_size)
            codes, scale = quantise_matrix(matrix.numpy(), how)
            name = f"{own}.weight_packed" if asked.weights == "int4" else f"{own}.weight"
            assert data(tensors[name]) == codes.tobytes(), own
            assert data(tensors[f"{own}.weight_scale"]) == scale.tobytes(), own
            assert tuple(tensors[f"{own}.weight_scale"].shape) == how.scale_shape(*matrix.shape)
            left -= {name, f"{own}.weight_scale"}
            if asked.weights == "int4":
                assert tensors[f"{own}.weight_shape"].tolist() == list(matrix.shape)
                left.remove(f"{own}.weight_shape")
        if asked.activations == "fp8-static":
            assert tensors[f"{own}.input_scale"].shape == (1,)
            left.remove(f"{own}.input_scale")
    for name, value in values.items():
        module = name.split(".experts.")[0] + ".experts" if ".experts." in name else name.removesuffix(".weight")
        asked_of = found.precision.get(module)
        if asked_of is not None and asked_of.granularity:
            continue
        kind = None if asked_of is None or asked_of.weights == STORED else TORCH[asked_of.weights]
        assert torch.equal(plain[name], value if kind is None else value.to(kind).float()), name
        own_names = [n for n in left if n == name or (".experts" in name and n.startswith(f"{module}."))]
        assert own_names or ".experts" in name
        for own in own_names:
            assert tensors[own].dtype == (kind or before[own].dtype), own
            left.remove(own)
    caches = {f"{name}.{part}_scale" for name, kind in found.kv_cache.items() if kind == "fp8" for part in "kv"}
    assert left == caches


def skeleton(raw: Mapping[str, Any]) -> Any:
    """transformers' model without values, a Linear for every matrix, as quantised files are loaded."""
    pytest.importorskip("compressed_tensors")
    from transformers import Llama4ForCausalLM, Llama4TextConfig
    from transformers.quantizers.base import SequentialLlama4TextExperts

    with torch.device("meta"):
        model = Llama4ForCausalLM(Llama4TextConfig(**{k: v for k, v in raw.items() if k not in formats.OF_THE_FILE}))
        for layer in model.model.layers:
            if layer.is_moe_layer:
                layer.feed_forward.experts = SequentialLlama4TextExperts(model.config)
    return model


def check_declaration(out: Path, found: Resolved, model: Any) -> None:
    """The library that the form is of gives each module the scheme that was asked for, and our own reader too."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    section = json.loads((out / "config.json").read_text()).get("quantization_config")
    quantised = {name: own for name, own in found.precision.items() if own.granularity}
    if not quantised and "fp8" not in found.kv_cache.values():
        assert section is None
        return
    config = QuantizationConfig.model_validate(section)
    assert (config.kv_cache_scheme is not None) == ("fp8" in found.kv_cache.values())
    model = copy.deepcopy(model)
    config.kv_cache_scheme = None  # the library knows no attention of Llama 4, see tests/formats.py
    apply_quantization_config(model, config)
    ours = open_checkpoint(out).quantization
    assert ours is not None
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        owner = name.split(".experts.")[0] + ".experts" if ".experts." in name else name
        asked = found.precision.get(owner, Precision())  # no head where embeddings are tied
        scheme, group = getattr(module, "quantization_scheme", None), ours.group_of(name)
        assert (scheme is None) == (group is None) == (owner not in quantised), name
        if scheme is None or group is None:
            continue
        weights, inputs = scheme.weights, scheme.input_activations
        kinds = {"fp8": ("float", 8), "int4": ("int", 4)}
        assert (weights.type, weights.num_bits) == kinds[asked.weights] and weights.symmetric and not weights.dynamic
        assert (weights.strategy, weights.group_size or 0) == (asked.granularity, asked.group_size), name
        as_said = "none" if inputs is None else "fp8-dynamic" if inputs.dynamic else "fp8-static"
        assert as_said == asked.activations
        if inputs is not None:
            assert (inputs.type, inputs.num_bits) == ("float", 8)
            assert inputs.strategy == ("token" if inputs.dynamic else "tensor")
        assert f"fp8-{group.activations}".replace("fp8-none", "none") == asked.activations
        assert (group.scheme.form, group.scheme.group_size) == (asked.granularity, asked.group_size)


def can_be(own: Recipe, one: Rule, source: Path) -> bool:
    """Whether one rule by itself is not refused."""
    try:
        resolved(replace(own, rules=(one,)), source)
    except UnsupportedError:
        return False
    return True


TIED = OTHER | {"tie_word_embeddings": True}
RAWS = {"RAW": RAW, "OTHER": TIED}
GLOBS = ["*.self_attn.*", "*.self_attn.k_proj", "*.experts", "model.layers.1.*", "*.shared_expert.*", "lm_head", "*",
         "model.layers.last.*", "*down_proj", "*.feed_forward.*", "model.embed_tokens"]  # fmt: skip
ASKED: list[dict[str, object]] = [
    {"weights": "fp8", "granularity": "tensor"},
    {"weights": "fp8", "granularity": "tensor", "activations": "fp8-static"},
    {"weights": "fp8", "granularity": "channel", "activations": "fp8-dynamic"},
    {"weights": "fp8", "granularity": "channel", "activations": "fp8-static", "kv_cache": "fp8"},
    {"weights": "int4", "group_size": 8},
    {"weights": "int4", "group_size": 16},
    {"weights": "bf16"},
    {"weights": "fp16"},
    {"weights": "fp32"},
]


@pytest.fixture(scope="module")
def skeletons() -> dict[str, Any]:
    return {name: skeleton(raw) for name, raw in RAWS.items()}


def plain_source(raw: dict[str, Any], seed: int) -> Handmade:
    """A plain checkpoint, each matrix of a type of its own, each layer's experts in a layout of its own."""
    rng = random.Random(seed)
    of_experts = [rng.choice(KINDS) for _ in range(raw["num_hidden_layers"])]
    weights = {
        name: w.to(of_experts[int(name.split(".")[2])] if ".experts." in name else rng.choice(KINDS))
        for name, w in random_weights(parsed(raw), seed).items()
    }
    return handmade(raw, weights, lambda name: PLAIN_WAY, lambda layer: rng.choice(["fused", "linear"]))


@given(
    st.sampled_from(["RAW", "OTHER"]),
    st.integers(0, 99),
    st.lists(st.tuples(st.sampled_from(GLOBS), st.sampled_from(ASKED)), min_size=1, max_size=4),
    st.sampled_from(["fp32", "fp16"]),
)
@settings(max_examples=12, phases=[Phase.generate])
def test_any_recipe_on_any_plain_checkpoint(
    skeletons: dict[str, Any], which: str, seed: int, asked: list[tuple[str, dict[str, object]]], dtype: str
) -> None:
    own = recipe(*(rule(glob, **keys) for glob, keys in asked))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = plain_source(RAWS[which], seed).write(folder / "source")
        calibration = write_calibration(folder / "calibration.json", source)
        assume(all(can_be(own, one, source) for one in own.rules))
        found = resolved(own, source)
        with pytest.MonkeyPatch.context() as patch:
            if which == "OTHER":  # its graph is another test's: tracing takes seconds
                patch.setattr(exporting, "_write_graph", lambda *arguments: None)
            result, _ = run(source, folder / "out", own, calibration=calibration, dtype=dtype)
        if result.bytes_linked:
            return  # it is so already
        check_values(folder / "out", source, found)
        check_declaration(folder / "out", found, skeletons[which])
        config = json.loads((folder / "out" / "config.json").read_text())
        assert parsed({k: v for k, v in config.items() if k != "quantization_config"}) == parsed(RAWS[which])
        kinds = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        plain = {kinds[own.weights] for own in found.precision.values() if own.weights in PLAIN}
        assert config.get("dtype") == (plain.pop() if len(plain) == 1 else None)


# What is quantised already.

ALL_FP8 = {"weights": "fp8", "granularity": "channel", "activations": "fp8-dynamic"}


def stored_as(way: Way, layout: str = "linear", *, plain: str = "lm_head") -> Handmade:
    made = by_hand(way, lambda name: plain in name or "router" in name, layout)
    return declare_modelopt(made) if layout == "fused" else declare_compressed_tensors(made)


def numbers_and_scales(path: Path, module: str) -> tuple[bytes, list[float]]:
    tensors = tensors_of(path)
    return data(tensors[f"{module}.weight"]), tensors[f"{module}.weight_scale"].float().reshape(-1).tolist()


@pytest.mark.parametrize("form", ["channel", "tensor"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_form_keeps_numbers_and_scales(tmp_path: Path, form: str, kind: torch.dtype) -> None:
    source = stored_as(Way(form, 0, kind)).write(tmp_path / "source")
    own = recipe(rule("*", weights="fp8", granularity=form, activations="fp8-dynamic"))
    result, said = run(source, tmp_path / "out", own)
    assert not result.bytes_linked and any("lm_head was quantised" in line for line in said) is False
    assert not any("rounded twice" in line for line in said)
    kept = 0
    for module, _, _ in matrices_of(dequantised_state(source)):
        if f"{module}.weight_scale" in tensors_of(source):
            assert numbers_and_scales(tmp_path / "out", module) == numbers_and_scales(source, module)
            kept += 1
    assert kept > 40
    values, new = dequantised_state(source), dequantised_state(tmp_path / "out")
    assert all(torch.equal(new[name], value) for name, value in values.items() if name != "lm_head.weight")


@pytest.mark.parametrize(("stored", "asked"), [("channel", "tensor"), ("tensor", "channel"), ("group", "channel")])
def test_another_form_is_rounded_twice_and_that_is_said(tmp_path: Path, stored: str, asked: str) -> None:
    source = stored_as(Way(stored, 16 if stored == "group" else 0)).write(tmp_path / "source")
    own = recipe(rule("*.experts", weights="fp8", granularity=asked), rule("*", weights="bf16"))
    _, said = run(source, tmp_path / "out", own)
    (line,) = [line for line in said if "rounded twice" in line]
    experts = RAW["num_local_experts"] * 3 * 2
    assert line.startswith("model.layers.1.feed_forward.experts.0.gate_proj and") and f"{experts - 1} more" in line
    check_values(tmp_path / "out", source, resolved(own, source))


def test_int4_becomes_int4_of_other_groups_but_not_of_the_same(tmp_path: Path) -> None:
    source = stored_as(Way("group", 16)).write(tmp_path / "source")
    eight = recipe(rule("*.experts", weights="int4", group_size=8), rule("*", weights="bf16"))
    _, said = run(source, tmp_path / "out", eight)
    assert any("rounded twice" in line for line in said)
    check_values(tmp_path / "out", source, resolved(eight, source))
    same = recipe(rule("*.experts", weights="int4", group_size=16), rule("*", weights="bf16"))
    with pytest.raises(UnsupportedError, match="0.gate_proj' is INT4 already"):
        run(source, tmp_path / "same", same)
    with pytest.raises(UnsupportedError, match="is INT4 already"):
        run(source, tmp_path / "same", recipe(rule("lm_head", weights="fp8")))
    assert not (tmp_path / "same").exists()
    whole = recipe(rule("*.experts", weights="int4", group_size=16), rule("lm_head", weights="bf16"),
                   rule("*", weights="int4", group_size=16))  # fmt: skip
    result, _ = run(source, tmp_path / "same", replace(whole, rules=whole.rules[:2]))
    assert result.bytes_linked  # the rest is not named, and is there: nothing is to be done


def with_scales(made: Handmade, seed: int = 0) -> Handmade:
    """ModelOpt's scales of inputs, each another."""
    generator = torch.Generator().manual_seed(seed)
    for name in list(made.tensors):
        if name.endswith("weight_scale"):
            made.tensors[name.replace("weight_scale", "input_scale")] = 0.01 + torch.rand((), generator=generator) / 50
    return made


def test_modelopts_own_scales_are_used(tmp_path: Path) -> None:
    """Fused experts come apart: the same numbers, turned, the same scales; no calibration is asked for."""
    source = with_scales(stored_as(TENSOR, "fused")).write(tmp_path / "source")
    own = recipe(
        rule("model.layers.0.*", weights="bf16"),
        rule("*.experts", weights="fp8", granularity="tensor", activations="fp8-static"),
        rule("*.v_proj", weights="fp8", granularity="channel", activations="fp8-static"),
        rule("model.layers.*", weights="fp8", granularity="tensor", activations="fp8-static"),
    )
    _, said = run(source, tmp_path / "out", own)
    old, new = tensors_of(source), tensors_of(tmp_path / "out")
    for layer in (1, 3):
        module = f"model.layers.{layer}.feed_forward.experts"
        for e in range(RAW["num_local_experts"]):
            gate, up = old[f"{module}.gate_up_proj"].view(torch.uint8)[e].chunk(2, dim=1)
            down = old[f"{module}.down_proj"].view(torch.uint8)[e]
            for part, numbers, fused in (("gate", gate, "gate_up"), ("up", up, "gate_up"), ("down", down, "down")):
                name = f"{module}.{e}.{part}_proj"
                assert torch.equal(new[f"{name}.weight"].view(torch.uint8), numbers.T), name
                for scale in ("weight_scale", "input_scale"):
                    assert new[f"{name}.{scale}"].item() == old[f"{module}.{fused}_proj_{scale}"].item()
    for name, tensor in old.items():
        if name.endswith("_proj.input_scale") and ".layers.0." not in name:
            assert new[name].item() == tensor.item()
    assert not any(".layers.0." in name and name.endswith("_scale") for name in new)
    manifest = json.loads((tmp_path / "out" / "shuntyard.json").read_text())
    dropped = {name for name in old if name.endswith("input_scale") and ".layers.0." in name}
    assert set(manifest["waived"]) == dropped  # what was taken over is not waived
    (line,) = [line for line in said if "rounded twice" in line]
    assert line.startswith("model.layers.1.self_attn.v_proj and 2 more")
    assert "hf_quant_config.json" not in {path.name for path in (tmp_path / "out").iterdir()}
    # A calibration does not take the place of the file's own scales.
    calibration = write_calibration(tmp_path / "calibration.json", source)
    run(source, tmp_path / "calibrated", own, calibration=calibration)
    again = tensors_of(tmp_path / "calibrated")
    assert again.keys() == new.keys() and all(data(again[name]) == data(tensor) for name, tensor in new.items())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_scales_that_are_none(tmp_path: Path, value: float) -> None:
    made = with_scales(stored_as(TENSOR, "fused"))
    name = "model.layers.3.feed_forward.experts.down_proj_input_scale"
    made.tensors[name] = torch.tensor(value)
    source = made.write(tmp_path / "source")
    own = recipe(rule("*.experts", weights="fp8", granularity="tensor", activations="fp8-static"))
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds {value}"):
        run(source, tmp_path / "out", own)
    with pytest.raises(CheckpointError, match=f"tensor '{name}' holds {value}"):
        run(source, tmp_path / "out", read_recipe(STORED))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_calibrated_scales_are_those_of_the_file(tmp_path: Path) -> None:
    """Each module has its own, also each expert's matrices and each cache."""
    source = write_checkpoint(tmp_path / "source", RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()})
    calibration = write_calibration(tmp_path / "calibration.json", source)
    own = recipe(rule("*", weights="fp8", granularity="tensor", activations="fp8-static", kv_cache="fp8"))
    run(source, tmp_path / "out", own, calibration=calibration)
    said, new = json.loads(calibration.read_text()), tensors_of(tmp_path / "out")
    scales = {f"{module}.input_scale": clip for module, clip in said["inputs"].items()}
    for part, of in (("k", "keys"), ("v", "values")):
        scales |= {f"{module}.{part}_scale": clip for module, clip in said[of].items()}
    del scales["model.embed_tokens.input_scale"]
    scales = {name: clip for name, clip in scales.items() if ".router." not in name}
    found = {name: tensor for name, tensor in new.items() if name.endswith(("input_scale", ".k_scale", ".v_scale"))}
    assert found.keys() == scales.keys() and len(set(scales.values())) == len(scales)
    for name, clip in scales.items():
        assert found[name].dtype == torch.float32 and found[name].item() == np.float32(clip) / np.float32(448)
    manifest = json.loads((tmp_path / "out" / "shuntyard.json").read_text())
    assert manifest["fp8_kv_cache"] == [0, 1, 2, 3]


def test_caches_alone(tmp_path: Path, skeletons: dict[str, Any]) -> None:
    """A recipe of nothing but FP8 caches copies the weights as they are."""
    source = write_checkpoint(tmp_path / "source", RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()})
    calibration = write_calibration(tmp_path / "calibration.json", source)
    own = recipe(rule(["model.layers.1.self_attn", "model.layers.3.self_attn"], kv_cache="fp8"))
    with pytest.raises(UnsupportedError, match=r"'model.layers.1.self_attn' needs a scale"):
        run(source, tmp_path / "out", own)
    run(source, tmp_path / "out", own, calibration=calibration)
    check_values(tmp_path / "out", source, resolved(own, source))
    check_declaration(tmp_path / "out", resolved(own, source), skeletons["RAW"])
    manifest = json.loads((tmp_path / "out" / "shuntyard.json").read_text())
    assert manifest["fp8_kv_cache"] == [1, 3]
    assert np.isfinite(logits(tmp_path / "out" / "model.onnx")).all()


def test_no_rule_no_activations(tmp_path: Path) -> None:
    """What a recipe does not name is not quantised at run time, be it linked or written anew."""
    made = stored_as(CHANNEL)
    for group in made.raw["quantization_config"]["config_groups"].values():
        group["input_activations"] = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}
    source = made.write(tmp_path / "source")
    kinds = {}
    for weights in ("fp32", "bf16"):  # the head is bf16 already
        own = recipe(rule("lm_head", weights=weights))
        run(source, tmp_path / weights, own)
        precision = json.loads((tmp_path / weights / "shuntyard.json").read_text())["precision"]
        kinds[weights] = {name: module["activations"] for name, module in precision.items()}
        assert set(kinds[weights].values()) == {"none"}
    result, _ = run(source, tmp_path / "named", recipe(rule("lm_head", weights="bf16"), rule("*", **ALL_FP8)))
    assert result.bytes_linked  # what is asked for is there
    run(source, tmp_path / "stored", read_recipe(STORED))
    for name in ("named", "stored"):
        precision = json.loads((tmp_path / name / "shuntyard.json").read_text())["precision"]
        plain = {n for n, module in precision.items() if module["activations"] == "none"}
        assert plain == {n for n in precision if n.endswith((".router", "lm_head", "embed_tokens"))}


def test_routers_that_are_quantised_keep_their_values(tmp_path: Path) -> None:
    """They decide: dequantised in fp32, which is exact, and not to bf16."""
    made = declare_compressed_tensors(by_hand(CHANNEL, lambda name: "router" not in name, "linear"))
    source = made.write(tmp_path / "source")
    run(source, tmp_path / "out", recipe(rule("lm_head", weights="fp8")))
    before, after = dequantised_state(source), dequantised_state(tmp_path / "out")
    for layer in (1, 3):
        name = f"model.layers.{layer}.feed_forward.router.weight"
        assert torch.equal(before[name], after[name])
        assert not torch.equal(before[name], before[name].bfloat16().float())


def test_experts_of_several_types(tmp_path: Path) -> None:
    """Silently in the first one's they were rounded; a rule must say in which."""
    made = handmade(RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()}, lambda name: PLAIN_WAY)
    odd = "model.layers.3.feed_forward.experts.2.down_proj.weight"
    made.tensors[odd] = WEIGHTS["model.layers.3.feed_forward.experts.down_proj"][2].T.contiguous()
    source = made.write(tmp_path / "source")
    with pytest.raises(UnsupportedError, match=f"'{odd}' is F32, '.*3.feed_forward.experts.0.gate_proj.weight' BF16"):
        run(source, tmp_path / "out", recipe(rule("lm_head", weights="fp8")))
    own = recipe(rule("*.3.*.experts", weights="fp8"), rule("lm_head", weights="bf16"))
    run(source, tmp_path / "out", own)
    check_values(tmp_path / "out", source, resolved(own, source))


def test_nested(tmp_path: Path) -> None:
    formats.write_nested(tmp_path / "source", RAW, WEIGHTS, shard_size="20KB")
    source, own = tmp_path / "source", read_recipe("fp8-all-linear")
    with pytest.raises(UnsupportedError, match="has a vision tower"):
        run(source, tmp_path / "out", own)
    result, _ = run(source, tmp_path / "out", own, text_only=True)
    assert result.waived and all(name.startswith(formats.BESIDE_THE_TEXT) for name in result.waived)
    text = write_checkpoint(tmp_path / "text", RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()})
    run(text, tmp_path / "same", own)
    new, same = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "same")
    assert new.keys() == same.keys() and all(data(new[name]) == data(tensor) for name, tensor in same.items())
    assert (tmp_path / "out" / "model.onnx").read_bytes() == (tmp_path / "same" / "model.onnx").read_bytes()


LIBRARIES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "Maverick": (formats.write_maverick_fp8, {"plain_layers": (3,)}, "compressed_tensors"),
    "FP8 static": (formats.write_fp8_static, {"kv": True}, "compressed_tensors"),
    "FP8 dynamic": (formats.write_fp8_dynamic, {"nested": True}, "compressed_tensors"),
    "INT4": (formats.write_int4, {"group": 16}, "compressed_tensors"),
    "ModelOpt": (formats.write_modelopt_fp8, {"kv": True}, "modelopt.torch.quantization"),
    "ModelOpt as released": (
        formats.write_modelopt_fp8,
        {"kv": True, "nested": True, "as_released": True},
        "modelopt.torch.quantization",
    ),
}


@pytest.fixture(scope="module", params=LIBRARIES)
def library(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    write, options, needed = LIBRARIES[request.param]
    pytest.importorskip(needed)
    return request.param, write(tmp_path_factory.mktemp("library") / "source", RAW, WEIGHTS, **options)


def test_libraries_files(library: tuple[str, Path], tmp_path: Path) -> None:
    """bf16 of any of them is what transformers computes with their values, rounded once."""
    name, source = library
    run(source, tmp_path / "bf16", read_recipe("bf16"), text_only=True)
    values = formats.dequantised_state(source)
    rounded = {n: w if "router" in n else w.bfloat16().float() for n, w in values.items()}
    new = dequantised_state(tmp_path / "bf16")
    assert new.keys() == rounded.keys() and all(torch.equal(new[n], w) for n, w in rounded.items())
    assert "quantization_config" not in json.loads((tmp_path / "bf16" / "config.json").read_text())
    found = logits(tmp_path / "bf16" / "model.onnx")
    assert largest_difference(found, reference(rounded)) <= MODEL_MAX_ABS
    own = recipe(rule("*.experts", weights="fp8", granularity="tensor"), rule("*", weights="bf16"))
    _, said = run(source, tmp_path / "fp8", own, text_only=True)
    is_same = name.startswith(("ModelOpt", "FP8 static"))
    assert any("rounded twice" in line for line in said) != is_same
    if not is_same:
        check_values(tmp_path / "fp8", source, resolved(own, source))


def test_stored_does_what_the_file_declares(library: tuple[str, Path], tmp_path: Path) -> None:
    """Linked, with activations and caches as declared; without a recipe they stay, and a line says so."""
    name, source = library
    result, said = run(source, tmp_path / "stored", read_recipe(STORED), text_only=True)
    assert result.bytes_linked and not any("left as they are" in line for line in said)
    manifest = json.loads((tmp_path / "stored" / "shuntyard.json").read_text())
    declared = {"Maverick": "fp8-dynamic", "FP8 static": "fp8-static", "FP8 dynamic": "fp8-dynamic", "INT4": "none",
                "ModelOpt": "fp8-static", "ModelOpt as released": "fp8-static"}[name]  # fmt: skip
    kinds = {n: m["activations"] for n, m in manifest["precision"].items()}
    quantised = {n: m["weights"] == "fp8" for n, m in manifest["precision"].items()}
    assert kinds == {n: declared if own else "none" for n, own in quantised.items()}
    assert any(quantised.values()) == (name != "INT4")
    has_caches = name.startswith(("ModelOpt", "FP8 static"))
    assert manifest["fp8_kv_cache"] == ([0, 1, 2, 3] if has_caches else [])
    assert not any(n.endswith(("input_scale", "k_scale", "v_scale")) for n in manifest["waived"])
    lines: list[str] = []
    export(source, tmp_path / "plain", text_only=True, report=lines.append)
    assert any(f"activations are declared {declared[4:]}, and are left" in line for line in lines) == (name != "INT4")
    plain = json.loads((tmp_path / "plain" / "shuntyard.json").read_text())
    assert {m["activations"] for m in plain["precision"].values()} == {"none"} and plain["fp8_kv_cache"] == []
    again, other = logits(tmp_path / "stored" / "model.onnx"), logits(tmp_path / "plain" / "model.onnx")
    assert (np.abs(again - other).max() > 1e-3) == (name != "INT4")


def test_a_model_directory_is_exported_again(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()})
    own = read_recipe("fp8-all-linear")
    run(source, tmp_path / "one", own)
    for name, made in (("two", read_recipe(STORED)), ("three", own)):
        result, _ = run(tmp_path / "one", tmp_path / name, made)
        assert result.bytes_linked
        assert (tmp_path / name / "model.onnx").read_bytes() == (tmp_path / "one" / "model.onnx").read_bytes()
    export(tmp_path / "one", tmp_path / "four")
    precision = json.loads((tmp_path / "four" / "shuntyard.json").read_text())["precision"]
    assert {module["activations"] for module in precision.values()} == {"none"}
    shutil.rmtree(source)
    assert np.isfinite(logits(tmp_path / "three" / "model.onnx")).all()


@pytest.mark.parametrize("kind", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("layout", ["fused", "linear"])
def test_what_is_there_is_linked(tmp_path: Path, kind: str, layout: str) -> None:
    """A recipe of one type on a checkpoint of that type; routers keep theirs."""
    weights = {n: w.to(torch.float32 if "router" in n else TORCH[kind]) for n, w in WEIGHTS.items()}
    source = handmade(RAW, weights, lambda name: PLAIN_WAY, lambda layer: layout).write(tmp_path / "source")
    for name, linked in ((kind, True), ("bf16" if kind != "bf16" else "fp16", False)):
        result, _ = run(source, tmp_path / name, recipe(rule("*", weights=name)))
        assert bool(result.bytes_linked) == linked
        shard = next((tmp_path / name).glob("*.safetensors"))
        assert shard.samefile(source / "model.safetensors") == linked if linked else shard.stat().st_nlink == 1
        dtypes = {n: t.dtype for n, t in tensors_of(tmp_path / name).items()}
        norms = {n for n in dtypes if "norm" in n}
        assert {dtypes[n] for n in dtypes if n not in norms and "router" not in n} == {TORCH[name]}
        assert {dtypes[n] for n in norms} == {TORCH[kind]}
        assert {dtypes[n] for n in dtypes if "router" in n} == {torch.float32}


class TestRefused:
    @pytest.fixture
    def source(self, tmp_path: Path) -> Path:
        return write_checkpoint(tmp_path / "source", RAW, {n: w.bfloat16() for n, w in WEIGHTS.items()})

    STATIC = rule("*.v_proj", weights="fp8", activations="fp8-static")

    def test_static_without_calibration(self, source: Path, tmp_path: Path) -> None:
        with pytest.raises(UnsupportedError, match="own.toml: 'model.layers.0.self_attn.v_proj' needs a scale"):
            run(source, tmp_path / "out", recipe(self.STATIC))
        assert [path.name for path in tmp_path.iterdir()] == ["source"]

    def test_caches_by_head(self, tmp_path: Path) -> None:
        made = with_scales(stored_as(TENSOR, "fused"))
        assert made.beside is not None
        made.beside["quantization"]["kv_cache_quant_algo"] = "FP8"
        made.tensors |= {f"model.layers.1.self_attn.{part}_proj.{part}_scale": torch.ones(2) for part in "kv"}
        source = made.write(tmp_path / "source")
        with pytest.raises(UnsupportedError, match=r"1.self_attn.k_proj.k_scale' is \[2\]; a scale .* is one number"):
            run(source, tmp_path / "out", recipe(rule("model.layers.1.self_attn", kv_cache="fp8")))

    def test_some_of_them_have_a_scale(self, tmp_path: Path) -> None:
        """A file that has scales for some modules does not do for others."""
        made = with_scales(stored_as(TENSOR, "fused", plain="v_proj"))
        source = made.write(tmp_path / "source")
        own = recipe(rule(["*.q_proj", "*.v_proj"], weights="fp8", granularity="tensor", activations="fp8-static"))
        with pytest.raises(UnsupportedError, match="0.self_attn.v_proj' needs a scale"):
            run(source, tmp_path / "out", own)

    def test_calibration_of_another(self, source: Path, tmp_path: Path) -> None:
        other = write_checkpoint(tmp_path / "other", RAW, {n: w.half() for n, w in WEIGHTS.items()})
        calibration = write_calibration(tmp_path / "calibration.json", other)
        for made in (recipe(self.STATIC), read_recipe("fp8"), read_recipe("stored")):
            with pytest.raises(CheckpointError, match="the calibration is of another checkpoint"):
                run(source, tmp_path / "out", made, calibration=calibration)
        assert not (tmp_path / "out").exists()

    def test_calibration_that_lacks_a_module(self, source: Path, tmp_path: Path) -> None:
        path = write_calibration(tmp_path / "calibration.json", source)
        said = json.loads(path.read_text())
        del said["inputs"]["model.layers.2.self_attn.v_proj"]
        path.write_text(json.dumps(said))
        with pytest.raises(CheckpointError, match="does not have 'model.layers.2.self_attn.v_proj'"):
            run(source, tmp_path / "out", recipe(self.STATIC), calibration=path)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("weights", ["fp8", "int4", "bf16"])
    def test_values_that_are_not_finite(self, tmp_path: Path, value: float, weights: str) -> None:
        own = {n: w.clone() for n, w in WEIGHTS.items()}
        own["lm_head.weight"][3, 4] = value
        source = write_checkpoint(tmp_path / "source", RAW, own)
        more: dict[str, object] = {"group_size": 8} if weights == "int4" else {}
        with pytest.raises(CheckpointError, match=r"'lm_head.weight' at \[3, 4\] holds"):
            run(source, tmp_path / "out", recipe(rule("lm_head", weights=weights, **more)))
        assert not (tmp_path / "out").exists()

    def test_values_that_fp16_does_not_hold(self, tmp_path: Path) -> None:
        own = {n: w.bfloat16() for n, w in WEIGHTS.items()}
        own["lm_head.weight"][3, 4] = 1e6
        source = write_checkpoint(tmp_path / "source", RAW, own)
        with pytest.raises(CheckpointError, match="is beyond 65504, the largest value of F16"):
            run(source, tmp_path / "out", recipe(rule("lm_head", weights="fp16")))
        assert not (tmp_path / "out").exists()


def test_what_the_library_reads(tmp_path: Path) -> None:
    """compressed-tensors' own arithmetic on our files, one scheme at a time: the values of our definition."""
    pytest.importorskip("compressed_tensors")
    source = write_checkpoint(tmp_path / "source", RAW, WEIGHTS)
    ways: dict[str, dict[str, object]] = {
        "tensor": {"weights": "fp8", "granularity": "tensor"},
        "channel": {"weights": "fp8", "granularity": "channel"},
        "int4": {"weights": "int4", "group_size": 16},
    }
    for name, keys in ways.items():
        own = recipe(rule(["model.layers.*", "lm_head"], **keys), rule("*", weights="bf16"))
        run(source, tmp_path / name, own)
        theirs, ours = formats.dequantised_state(tmp_path / name), dequantised_state(tmp_path / name)
        assert theirs.keys() == ours.keys() and all(torch.equal(theirs[n], value) for n, value in ours.items())
        for own_name, module, matrix in matrices_of(WEIGHTS):
            if module in ("model.embed_tokens",) or module.endswith("router"):
                continue
            asked = resolved(own, source).precision[module]
            how = Quantize(cast(Literal["tensor", "channel", "group"], asked.granularity), asked.group_size)
            codes, scale = quantise_matrix(matrix.numpy(), how)
            found = tensors_of(tmp_path / name)
            if name != "int4":
                wide = codes.astype(np.float32) * scale
                assert codes.dtype == ml_dtypes.float8_e4m3fn
                mine = found[f"{own_name}.weight"].float() * found[f"{own_name}.weight_scale"]
                assert torch.equal(mine, Tensor(wide))
