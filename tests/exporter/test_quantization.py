"""What checkpoints declare about their quantisation: how it is read, and what is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.quantization import Scheme
from tests.exporter.declarations import (
    DYNAMIC,
    INT4,
    STATIC,
    WEIGHTS,
    Q,
    beside,
    compressed_tensors,
    declared,
    group,
    modelopt,
    read,
    refusal,
)

READ: dict[str, tuple[dict[str, Any], list[Scheme], str, bool]] = {
    "FP8 by channel": (compressed_tensors(), [Scheme("channel")], "none", False),
    "FP8 by tensor": (compressed_tensors(group(STATIC)), [Scheme("tensor")], "none", False),
    "INT4": (compressed_tensors(group(INT4), format="pack-quantized"), [Scheme("group", 128)], "none", False),
    "INT4 by channel": (
        compressed_tensors(group(INT4 | {"strategy": "channel", "group_size": None})),
        [Scheme("group")],
        "none",
        False,
    ),
    "strategy by the group size": (
        compressed_tensors(group(INT4 | {"strategy": None, "group_size": 32})),
        [Scheme("group", 32)],
        "none",
        False,
    ),
    "strategy by a group size of -1": (
        compressed_tensors(group(WEIGHTS | {"strategy": None, "group_size": -1})),
        [Scheme("channel")],
        "none",
        False,
    ),
    "strategy by nothing": (compressed_tensors(group(WEIGHTS | {"strategy": None})), [Scheme("tensor")], "none", False),
    "dynamic": (compressed_tensors(group(input_activations=DYNAMIC)), [Scheme("channel")], "dynamic", False),
    "static": (compressed_tensors(group(STATIC, input_activations=STATIC)), [Scheme("tensor")], "static", False),
    "static and dynamic": (
        compressed_tensors(group(input_activations=STATIC), group(None, Q, input_activations=DYNAMIC)),
        [Scheme("channel")] * 2,
        "static and dynamic",
        False,
    ),
    "activations in INT8": (
        compressed_tensors(group(input_activations=DYNAMIC | {"type": "int"})),
        [Scheme("channel")],
        "other",
        False,
    ),
    "KV cache": (compressed_tensors(kv_cache_scheme=STATIC), [Scheme("channel")], "none", True),
    "two groups": (
        compressed_tensors(group(None, "re:.*self_attn.*"), group(INT4, "Linear")),
        [Scheme("channel"), Scheme("group", 128)],
        "none",
        False,
    ),
    "calibrated in the order of activations": (
        compressed_tensors(group(INT4 | {"actorder": "static"}), group(INT4 | {"actorder": "weight"}, Q)),
        [Scheme("group", 128)] * 2,
        "none",
        False,
    ),
    "every key that older versions write": (
        compressed_tensors(
            group(
                WEIGHTS
                | {
                    "actorder": None,
                    "block_structure": None,
                    "group_size": None,
                    "observer": "minmax",
                    "observer_kwargs": {"averaging_constant": 0.01},
                    "scale_dtype": None,
                    "zp_dtype": "torch.int8",
                    "is_mx": False,
                },
                input_activations=DYNAMIC | {"observer": None, "observer_kwargs": {}},
                output_activations=None,
                format="float-quantized",
            ),
            global_compression_ratio=1.5,
            kv_cache_scheme=None,
            moe_sparsity_config=None,
            sparsity_config={},
            transform_config={},
            version="0.20.0",
            ignore=None,
        ),
        [Scheme("channel")],
        "dynamic",
        False,
    ),
    "no sparsity": (
        compressed_tensors(sparsity_config={"format": "dense", "global_sparsity": 0.1, "ignore": []}),
        [Scheme("channel")],
        "none",
        False,
    ),
    "modelopt": (modelopt(), [Scheme("tensor")], "static", False),
    "modelopt with a KV cache": (modelopt(kv_cache_scheme=STATIC), [Scheme("tensor")], "static", True),
}


@pytest.mark.parametrize("case", READ)
def test_read(case: str, tmp_path: Path) -> None:
    section, schemes, activations, kv_cache = READ[case]
    found = declared(tmp_path, section)
    assert [one.scheme for one in found.groups] == schemes
    assert (" and ".join(found.activations) or "none", found.kv_cache) == (activations, kv_cache)
    assert found.method == section["quant_method"] and found.source == tmp_path / "config.json"
    assert str(found).startswith(f"{found.method}: ") and ("KV" in str(found)) == kv_cache


def test_nothing_declared(tmp_path: Path) -> None:
    assert read(tmp_path, None) is None


def test_modelopts_file(tmp_path: Path) -> None:
    found = declared(tmp_path, None, beside(kv_cache_quant_algo="FP8"))
    assert found.method == "modelopt" and found.source == tmp_path / "hf_quant_config.json"
    assert found.kv_cache and found.ignored == ("lm_head",)
    assert found.scheme_of(Q) == Scheme("tensor")


def test_modelopts_file_beside_the_same_embedded(tmp_path: Path) -> None:
    """In whichever order modules are listed."""
    found = declared(tmp_path, modelopt(ignore=["a", "lm_head"]), beside(exclude_modules=["lm_head", "a"]))
    assert found.source == tmp_path / "config.json" and found.scheme_of("lm_head") is None


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    **{
        method: ({"quant_method": method}, f"quantization_config (quant_method '{method}') is not supported")
        for method in ("fbgemm_fp8", "gptq", "awq", "bitsandbytes", "fp8", "mxfp4", "quark", "Compressed-Tensors")
    },
    "no method": ({"config_groups": {}}, "quantization_config (quant_method None) is not supported"),
    "a method that is no word": ({"quant_method": ["modelopt"]}, "quantization_config (quant_method ['modelopt'])"),
    "int8": (
        compressed_tensors(group(WEIGHTS | {"type": "int"})),
        "group_0: weights of type int with 8 bits, strategy",
    ),
    "FP4": (
        compressed_tensors(group(WEIGHTS | {"num_bits": 4, "strategy": "tensor_group", "group_size": 16})),
        "group_0: weights of type float with 4 bits, strategy 'tensor_group'",
    ),
    "2 bits": (compressed_tensors(group(INT4 | {"num_bits": 2})), "weights of type int with 2 bits"),
    "by block": (compressed_tensors(group(WEIGHTS | {"strategy": "block"})), "with 8 bits, strategy 'block', are not"),
    "by block of some structure": (
        compressed_tensors(group(WEIGHTS | {"strategy": "block", "block_structure": [128, 128]})),
        "config_groups.group_0.weights.block_structure",
    ),
    "FP8 by group": (compressed_tensors(group(WEIGHTS | {"strategy": "group", "group_size": 128})), "strategy 'group'"),
    "FP8 by token": (compressed_tensors(group(WEIGHTS | {"strategy": "token"})), "strategy 'token'"),
    "INT4 by tensor": (
        compressed_tensors(group(INT4 | {"strategy": "tensor", "group_size": None})),
        "with 4 bits, strategy 'tensor'",
    ),
    "groups of no size": (compressed_tensors(group(INT4 | {"group_size": None})), "with 4 bits, strategy 'group'"),
    "groups of zero": (compressed_tensors(group(INT4 | {"group_size": 0})), "with 4 bits, strategy 'group'"),
    "a group size for channels": (
        compressed_tensors(group(WEIGHTS | {"group_size": 128})),
        "group_0: weights.group_size is 128, but strategy is 'channel'",
    ),
    "asymmetric": (
        compressed_tensors(group(INT4 | {"symmetric": False})),
        "config_groups.group_0.weights.symmetric: Input should be True, got False",
    ),
    **{
        f"actorder {order!r}": (
            compressed_tensors(group(INT4 | {"actorder": order})),
            f"group_0: weights.actorder is {order!r}: permuted groups",
        )
        for order in ("group", "dynamic", True)
    },
    "actorder of another kind": (
        compressed_tensors(group(INT4 | {"actorder": "columns"})),
        "config_groups.group_0.weights.actorder",
    ),
    "microscaling": (compressed_tensors(group(WEIGHTS | {"is_mx": True})), "weights.is_mx: Input should be False"),
    "dynamic weights": (compressed_tensors(group(WEIGHTS | {"dynamic": True})), "group_0: weights.dynamic is true"),
    "local weights": (compressed_tensors(group(WEIGHTS | {"dynamic": "local"})), "group_0: weights.dynamic is true"),
    "no weights": (
        compressed_tensors({"targets": ["Linear"], "input_activations": DYNAMIC}),
        "group_0: quantises no weights",
    ),
    "outputs": (compressed_tensors(group(output_activations=STATIC)), "config_groups.group_0.output_activations"),
    "a class for a target": (
        compressed_tensors(group(None, "Llama4TextMLP")),
        "target 'Llama4TextMLP' is not understood",
    ),
    "an odd target among good ones": (
        compressed_tensors(group(None, Q, "Linear", "*")),
        "target '*' is not understood",
    ),
    "status": (
        compressed_tensors(quantization_status="frozen"),
        "quantization_config.quantization_status: Input should be 'compressed', got 'frozen'",
    ),
    "format": (
        compressed_tensors(format="marlin-24"),
        "quantization_config.format: Input should be 'float-quantized', 'pack-quantized'",
    ),
    "int8's format": (compressed_tensors(format="int-quantized"), "quantization_config.format: Input should be"),
    "NVFP4's format": (
        compressed_tensors(format="nvfp4-pack-quantized"),
        "quantization_config.format: Input should be",
    ),
    "unknown key": (
        compressed_tensors(rotation="hadamard"),
        "quantization_config.rotation: Extra inputs are not permitted, got 'hadamard'",
    ),
    "unknown key of a group": (
        compressed_tensors(group(permuted=True)),
        "config_groups.group_0.permuted: Extra inputs",
    ),
    "unknown key of weights": (
        compressed_tensors(group(WEIGHTS | {"global_scale": 1})),
        "config_groups.group_0.weights.global_scale: Extra inputs",
    ),
    "sparsity": (
        compressed_tensors(sparsity_config={"format": "sparse-24-bitmask", "targets": ["Linear"]}),
        "quantization_config.sparsity_config is {'format': 'sparse-24-bitmask', 'targets': ['Linear']}: sparsity and",
    ),
    "transforms": (
        compressed_tensors(transform_config={"config_groups": {"u": {"type": "hadamard"}}}),
        "quantization_config.transform_config is {'config_groups': {'u': {'type': 'hadamard'}}}: sparsity and tran",
    ),
    "experts' sparsity": (compressed_tensors(moe_sparsity_config={"x": 1}), "quantization_config.moe_sparsity_config"),
    "modelopt NVFP4": (
        modelopt(quant_algo="NVFP4"),
        "quantization_config.quant_algo: Input should be 'FP8', got 'NVFP4'",
    ),
    "modelopt W4A8": (
        modelopt(quant_algo="W4A8_AWQ"),
        "quantization_config.quant_algo: Input should be 'FP8', got 'W4A8",
    ),
    "modelopt mixed": (modelopt(quant_algo="MIXED_PRECISION"), "quantization_config.quant_algo: Input should be 'FP8'"),
    "modelopt unknown key": (modelopt(rotate=True), "quantization_config.rotate: Extra inputs are not permitted"),
    "modelopt some targets": (
        modelopt(config_groups={"g": group(WEIGHTS, "re:.*experts.*")}),
        "config_groups.g: is not ModelOpt's FP8 of all Linears",
    ),
    "modelopt of four bits": (
        modelopt(config_groups={"g": group(STATIC | {"num_bits": 4})}),
        "config_groups.g: weights of type float with 4 bits, strategy 'tensor', are not supported",
    ),
    "modelopt by channel": (
        modelopt(config_groups={"g": group(WEIGHTS)}),
        "config_groups.g: is not ModelOpt's FP8 of all Linears",
    ),
    "modelopt in groups": (
        modelopt(config_groups={"g": group(STATIC | {"group_size": 16, "strategy": None})}),
        "config_groups.g: weights of type float with 8 bits, strategy 'group', are not supported",
    ),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported(case: str, tmp_path: Path) -> None:
    section, message = UNSUPPORTED[case]
    error = refusal(tmp_path, section)
    assert isinstance(error, UnsupportedError)
    assert message in error.message


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "bad regex in ignore": (
        compressed_tensors(ignore=["re:("]),
        "quantization_config: 're:(' is no regular expression",
    ),
    "bad regex in a target": (compressed_tensors(group(None, "re:*.mlp")), "'re:*.mlp' is no regular expression"),
    "no groups": (compressed_tensors(config_groups={}), "quantization_config.config_groups"),
    "groups missing": (compressed_tensors(config_groups=...), "quantization_config.config_groups: Field required"),
    "format missing": (compressed_tensors(format=...), "quantization_config.format: Field required"),
    "bits missing": (
        compressed_tensors(group({"type": "float"})),
        "config_groups.group_0.weights.num_bits: Field required",
    ),
    "bits that are no number": (
        compressed_tensors(group(WEIGHTS | {"num_bits": "eight"})),
        "weights.num_bits: Input sho",
    ),
    "targets missing": (compressed_tensors(group(targets=...)), "config_groups.group_0.targets: Field required"),
    "ignore a word": (compressed_tensors(ignore="lm_head"), "quantization_config.ignore: Input should be a valid list"),
    "ignore numbers": (compressed_tensors(ignore=[1]), "quantization_config.ignore.0: Input should be a valid string"),
    "groups a list": (
        compressed_tensors(config_groups=[group()]),
        "quantization_config.config_groups: Input should be",
    ),
    "modelopt without an algorithm": (modelopt(quant_algo=...), "quantization_config.quant_algo: Field required"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken(case: str, tmp_path: Path) -> None:
    section, message = BROKEN[case]
    assert message in refusal(tmp_path, section).message


BESIDE: dict[str, tuple[dict[str, Any] | None, Any, str]] = {
    "both methods": (
        compressed_tensors(),
        beside(),
        "hf_quant_config.json: declares ModelOpt's quantisation, config.json compressed-tensors'",
    ),
    "another list of modules": (
        modelopt(),
        beside(exclude_modules=["lm_head", Q]),
        "config.json: quantization_config says something else than hf_quant_config.json beside it",
    ),
    "a KV cache in the file alone": (
        modelopt(),
        beside(kv_cache_quant_algo="FP8"),
        "config.json: quantization_config says something else than hf_quant_config.json beside it",
    ),
    "a KV cache in config.json alone": (
        modelopt(kv_cache_scheme=STATIC),
        beside(),
        "config.json: quantization_config says something else than hf_quant_config.json beside it",
    ),
    "another method in config.json": ({"quant_method": "gptq"}, beside(), "config.json: quantization_config (quant_me"),
    "NVFP4": (
        None,
        beside(quant_algo="NVFP4"),
        "hf_quant_config.json: quantization.quant_algo: Input should be 'FP8', g",
    ),
    "NVFP4 beside FP8": (
        modelopt(),
        beside(quant_algo="NVFP4"),
        "hf_quant_config.json: quantization.quant_algo: Input",
    ),
    "W4A8": (None, beside(quant_algo="W4A8_AWQ", group_size=128), "hf_quant_config.json: quantization."),
    "by block": (
        None,
        beside(quant_algo="FP8_PB_WO"),
        "quantization.quant_algo: Input should be 'FP8', got 'FP8_PB_WO'",
    ),
    "by channel": (
        None,
        beside(quant_algo="FP8_PER_CHANNEL_PER_TOKEN"),
        "quantization.quant_algo: Input should be 'FP8'",
    ),
    "nothing": (None, beside(quant_algo=None), "quantization.quant_algo: Input should be 'FP8', got None"),
    "a KV cache in FP4": (
        None,
        beside(kv_cache_quant_algo="NVFP4"),
        "quantization.kv_cache_quant_algo: Input should be",
    ),
    "in groups": (None, beside(group_size=16), "quantization.group_size"),
    "smoothing": (None, beside(has_zero_point=True, pre_quant_scale=True), "quantization.has_zero_point: Extra inputs"),
    "layers of their own": (None, beside(quantized_layers={}), "quantization.quantized_layers: Extra inputs are not"),
    "unknown key": (
        None,
        beside() | {"rotation": {}},
        "hf_quant_config.json: rotation: Extra inputs are not permitted",
    ),
    "no quantization": (None, {"producer": {"name": "modelopt"}}, "hf_quant_config.json: quantization: Field required"),
    "another section": (
        None,
        {"quantization_config": modelopt()},
        "hf_quant_config.json: quantization: Field required",
    ),
    "no JSON": (None, "{", "hf_quant_config.json: is no valid JSON"),
    "a key twice": (
        None,
        '{"quantization": {"quant_algo": "FP8"}, "quantization": {"quant_algo": "FP8"}}',
        "hf_quant_config.json: is no valid JSON: key 'quantization' stands there twice",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_modelopts_file_refused(case: str, tmp_path: Path) -> None:
    section, file, message = BESIDE[case]
    assert message in refusal(tmp_path, section, file).message
