"""Tensors that contradict their declaration, their configuration or each other: each is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from shuntyard.exporter.checkpoint import open_checkpoint
from shuntyard.exporter.safetensors_header import read_values
from shuntyard.exporter.values import check_finite
from shuntyard.exporter.weights import match_weights
from tests.checkpoints import parsed, random_weights
from tests.exporter.handmade import (
    CHANNEL,
    PLAIN,
    TENSOR,
    Handmade,
    Way,
    data,
    declare_compressed_tensors,
    handmade,
    packed,
)
from tests.exporter.spoiling import (
    EXPERT,
    EXPERTS,
    FORMS,
    INT4,
    RAW,
    ROUTER,
    VISION,
    Q,
    Spoil,
    added,
    change,
    keys,
    match,
    modelopt,
    refusal,
    renamed,
    replaced,
    sound,
    without,
)

W, S, P, SHAPE = f"{Q}.weight", f"{Q}.weight_scale", f"{Q}.weight_packed", f"{Q}.weight_shape"
DOWN = f"{EXPERTS}.down_proj"  # [4, 64, 32], fused
PARTS = ("gate_proj", "up_proj", "down_proj")


@pytest.mark.parametrize("form", FORMS)
def test_sound(form: str, tmp_path: Path) -> None:
    """Every tensor is used, and each matrix is what was stored: none of the refusals below is of something else."""
    made = FORMS[form]()
    weights = match(made, tmp_path)
    check_finite(weights)
    assert weights.waived == [] and weights.tensors == len(made.tensors)
    kinds = {"plain": "none", "tensor": "tensor", "channel": "channel", "group": "group"}
    for module, way in made.ways.items():
        if ".experts." not in module:
            stored = weights.linears[f"{module}.weight"]
            assert (stored.form, stored.group_size) == (kinds[way.form], way.group)
    way = next(way for module, way in made.ways.items() if ".experts." in module)
    experts = weights.experts[1].form
    assert (experts.quantization, experts.group_size) == (kinds[way.form], way.group)
    assert experts.layout == ("fused" if DOWN in made.tensors else "linear")
    assert weights.parameters == sum(value.numel() for value in made.values.values())
    for _, stored in weights.stored():
        for entry in stored.entries():
            assert read_values(entry).tobytes() == data(made.tensors[entry.name])


def undeclared(made: Handmade) -> None:
    del made.raw["quantization_config"]


def ignored_too(made: Handmade) -> None:
    made.raw["quantization_config"]["ignore"].append(Q)


def fused_as_well(made: Handmade) -> None:
    for part in ("gate_up_proj", "down_proj"):
        made.tensors[f"{EXPERTS}.{part}"] = made.values[f"{EXPERTS}.{part}"]


def lying(tensor: Tensor) -> Tensor:
    """As many values in the other shape."""
    return tensor.flatten().reshape(tensor.shape[::-1])


Cases = dict[str, tuple[Spoil, str]]

FP8: Cases = {
    "scale without weight": (without(W), f"tensor '{W}' is missing"),
    "weight without scale": (without(S), f"'{W}' is F8_E4M3, but has no scale"),
    "declared but plain": (
        replaced(Q, PLAIN),
        f"'{Q}' is stored plain, but config.json declares it as FP8 with a scale for each output channel",
    ),
    "declared but plain, an expert": (replaced(EXPERT, PLAIN), f"'{EXPERT}' is stored plain, but config.json declares"),
    "ignored but quantised": (ignored_too, f"'{Q}' is stored as FP8 with a scale for each output channel, but config"),
    "by tensor": (replaced(Q, TENSOR), f"'{Q}' is stored as FP8 with a scale for each tensor, but config.json"),
    "INT4": (replaced(Q, INT4), f"'{Q}' is stored as INT4 in groups of 16, but config.json declares it as FP8"),
    "undeclared": (undeclared, "is stored as FP8 with a scale for each output channel, but config.json declares it pl"),
    "router": (replaced(ROUTER, CHANNEL), f"'{ROUTER}' is stored as FP8 with a scale for each output channel, but"),
    "embedding": (
        change("model.embed_tokens.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "'model.embed_tokens.weight' is F8_E4M3, but is no Linear and no expert",
    ),
    "norm": (
        change("model.norm.weight", lambda t: t.to(torch.float8_e4m3fn)),
        "'model.norm.weight' is F8_E4M3, but is no Linear and no expert",
    ),
    "a channel too few": (
        change(S, lambda t: t[:-1]),
        f"'{S}' has shape [63, 1]; a scale is one number, or one for each of 64 output channels",
    ),
    "scales of inputs": (added(S, torch.ones(1, 32)), f"'{S}' has shape [1, 32]"),
    "scales lying down": (change(S, lying), f"'{S}' has shape [1, 64]"),
    "scales by block": (added(S, torch.ones(2, 2)), f"'{S}' has shape [2, 2]"),
    "scales of nothing": (added(S, torch.ones(0)), f"'{S}' has shape [0]"),
    "integer scales": (change(S, lambda t: t.int()), f"'{S}' is I32; scales must be one of BF16, F16, F32"),
    "scales in powers of two": (change(S, lambda t: t.to(torch.float8_e8m0fnu)), f"'{S}' is F8_E8M0; scales must be"),
    "scales in fp64": (change(S, lambda t: t.double()), f"'{S}' is F64; scales must be"),
    "inverse scales": (renamed("weight_scale", "weight_scale_inv"), ".weight' is F8_E4M3, but has no scale beside it"),
    "E5M2": (
        change(W, lambda t: t.float().to(torch.float8_e5m2)),
        f"'{W}' is F8_E5M2 and has a scale; only F8_E4M3 is understood so",
    ),
    "int8": (change(W, lambda t: t.float().to(torch.int8)), f"'{W}' is I8 and has a scale; only F8_E4M3"),
    "bf16 with a scale": (change(W, lambda t: t.bfloat16()), f"'{W}' is BF16 and has a scale; only F8_E4M3"),
    "another shape": (change(W, lying), f"'{W}' has shape [32, 64], config.json asks for [64, 32]"),
    "an expert of another shape": (change(f"{EXPERT}.weight", lying), f"'{EXPERT}.weight' has shape [64, 32], config."),
    "weight_shape": (added(SHAPE, torch.tensor([64, 32])), f"tensor '{SHAPE}' is not understood"),
    "a smoothing scale": (added(f"{Q}.pre_quant_scale", torch.ones(32)), f"tensor '{Q}.pre_quant_scale' is not under"),
    "a bias": (added(f"{Q}.bias", torch.ones(64)), f"tensor '{Q}.bias' is not understood"),
    "an expert missing": (
        without(*(f"{EXPERTS}.3.{part}.{kind}" for part in PARTS for kind in ("weight", "weight_scale"))),
        f"tensor '{EXPERTS}.3.gate_proj.weight' is missing (and 2 more)",
    ),
    "an expert's scale of another type": (
        change(f"{EXPERT}.weight_scale", lambda t: t.float()),
        f"'{EXPERT}.weight' is stored in another way than '{EXPERTS}.0.gate_proj.weight'",
    ),
    "fused as well": (fused_as_well, f"tensor '{DOWN}' is not understood (nor 1 more)"),
}  # fmt: skip

PACKED: Cases = {
    "scale without weight": (without(P), f"tensor '{W}' is missing"),
    "weight without scale": (without(S), f"'{P}' has no '{S}' beside it"),
    "weight without shape": (without(SHAPE), f"'{P}' has no '{SHAPE}' beside it"),
    "FP8": (replaced(Q, CHANNEL), f"'{Q}' is stored as FP8 with a scale for each output channel, but config.json"),
    "other groups": (replaced(Q, Way("group", 8)), f"'{Q}' is stored as INT4 in groups of 8, but config.json"),
    "undeclared": (undeclared, "is stored as INT4 in groups of 16, but config.json declares it plain"),
    "another shape": (
        change(P, lambda t: t[:, :-1]),
        f"'{P}' is I32 [64, 3]; INT4 weights [64, 32] are packed as I32 [64, 4]",
    ),
    "lying down": (change(P, lying), f"'{P}' is I32 [4, 64]; INT4 weights [64, 32] are packed"),
    "along the outputs": (added(P, torch.zeros(8, 32, dtype=torch.int32)), f"'{P}' is I32 [8, 32]; INT4 weights"),
    "eight bits": (added(P, torch.zeros(64, 8, dtype=torch.int32)), f"'{P}' is I32 [64, 8]; INT4 weights [64, 32]"),
    "in bytes": (change(P, lambda t: t.view(torch.uint8)), f"'{P}' is U8 [64, 16]; INT4 weights [64, 32]"),
    "in floats": (change(P, lambda t: t.float()), f"'{P}' is F32 [64, 4]; INT4 weights [64, 32] are packed as I32"),
    "another true shape": (
        added(SHAPE, torch.tensor([32, 64])),
        f"'{SHAPE}' says [32, 64], config.json asks for [64, 32]",
    ),
    "a true shape in floats": (added(SHAPE, torch.tensor([64.0, 32.0])), f"'{SHAPE}' says F32, config.json asks for"),
    "a true shape of three": (added(SHAPE, torch.tensor([64, 32, 1])), f"'{SHAPE}' has shape [3]"),
    "groups of unequal size": (
        added(S, torch.ones(64, 3)),
        f"'{S}' has shape [64, 3]; INT4 weights [64, 32] need [64, groups], the groups of equal size",
    ),
    "groups of a channel too few": (change(S, lambda t: t[:-1]), f"'{S}' has shape [63, 2]"),
    "no groups": (added(S, torch.ones(64, 0)), f"'{S}' has shape [64, 0]"),
    "scales in one row": (added(S, torch.ones(64)), f"'{S}' has shape [64]"),
    "scales lying down": (change(S, lying), f"'{S}' has shape [2, 64]"),
    "scales in three dimensions": (change(S, lambda t: t[..., None]), f"'{S}' has shape [64, 2, 1]"),
    "integer scales": (change(S, lambda t: t.int()), f"'{S}' is I32; scales must be one of BF16, F16, F32"),
    "plain as well": (added(W, torch.ones(64, 32)), f"'{W}' is there twice, also as '{P}'"),
    "zero points": (
        added(f"{Q}.weight_zero_point", torch.zeros(8, 2, dtype=torch.int32)),
        f"tensor '{Q}.weight_zero_point' is not understood",
    ),
    "zero points of an expert": (
        added(f"{EXPERT}.weight_zero_point", torch.zeros(4, 4, dtype=torch.int32)),
        f"tensor '{EXPERT}.weight_zero_point' is not understood",
    ),
    "g_idx": (
        added(f"{Q}.weight_g_idx", torch.arange(32, dtype=torch.int32) // 16),
        f"tensor '{Q}.weight_g_idx' is not understood",
    ),
}  # fmt: skip

FUSED: Cases = {
    "weight without scale": (without(f"{DOWN}_weight_scale"), f"'{DOWN}' is F8_E4M3, but has no scale"),
    "scale without weight": (without(DOWN), f"tensor '{DOWN}' is missing"),
    "scale by another name": (
        renamed("down_proj_weight_scale", "down_proj.weight_scale"),
        f"'{DOWN}' is F8_E4M3, but has no scale",
    ),
    "inverse scale": (
        renamed("down_proj_weight_scale", "down_proj_weight_scale_inv"),
        f"'{DOWN}' is F8_E4M3, but has no scale",
    ),
    "declared but plain": (
        replaced(Q, PLAIN),
        f"'{Q}' is stored plain, but hf_quant_config.json declares it as FP8 with a scale for each tensor",
    ),
    "by channel": (replaced(Q, CHANNEL), f"'{Q}' is stored as FP8 with a scale for each output channel, but hf_quant"),
    "scales of channels": (
        added(f"{DOWN}_weight_scale", torch.ones(4, 1, 32)),
        f"'{DOWN}_weight_scale' has shape [4, 1, 32]; the scale of fused experts is one number",
    ),
    "scales of experts": (
        added(f"{DOWN}_weight_scale", torch.ones(4)),
        f"'{DOWN}_weight_scale' has shape [4]; the scale of fused experts is one number",
    ),
    "scale in integers": (added(f"{DOWN}_weight_scale", torch.ones((), dtype=torch.int32)), "_scale' is I32; scales"),
    "E5M2": (change(DOWN, lambda t: t.float().to(torch.float8_e5m2)), f"'{DOWN}' is F8_E5M2 and has a scale"),
    "another shape": (
        change(DOWN, lambda t: t.view(torch.uint8).mT.contiguous().view(t.dtype)),
        f"'{DOWN}' has shape [4, 32, 64], config.json asks for [4, 64, 32]",
    ),
    "scales of two types": (
        change(f"{DOWN}_weight_scale", lambda t: t.float()),
        f"'{DOWN}' is stored in another way than '{EXPERTS}.gate_up_proj'",
    ),
}  # fmt: skip

PLAINLY: Cases = {
    "FP8 without scale": (change(W, lambda t: t.to(torch.float8_e4m3fn)), f"'{W}' is F8_E4M3, but has no scale beside"),
    "E5M2 without scale": (change(W, lambda t: t.to(torch.float8_e5m2)), f"'{W}' is F8_E5M2; weights must be one of"),
    "scale beside it": (added(S, torch.ones(1)), f"'{W}' is F32 and has a scale; only F8_E4M3 is understood so"),
    "the first expert missing": (
        without(*(f"{EXPERTS}.0.{part}.weight" for part in PARTS)),
        f"tensor '{EXPERTS}.gate_up_proj' is missing (and 1 more); it has '{EXPERTS}.1.",
    ),
    "a part of the first expert missing": (
        without(f"{EXPERTS}.0.gate_proj.weight"),
        f"tensor '{EXPERTS}.0.gate_proj.weight' is missing",
    ),
    "an expert too many": (
        added(f"{EXPERTS}.4.up_proj.weight", torch.ones(64, 32)),
        f"tensor '{EXPERTS}.4.up_proj.weight' is not understood",
    ),
    "an expert by another number": (
        added(f"{EXPERTS}.00.up_proj.weight", torch.ones(64, 32)),
        f"tensor '{EXPERTS}.00.up_proj.weight' is not understood",
    ),
    "an expert of another type": (
        change(f"{EXPERT}.weight", lambda t: t.bfloat16()),
        f"'{EXPERT}.weight' is stored in another way than '{EXPERTS}.0.gate_proj.weight'",
    ),
    "fused as well": (fused_as_well, f"tensor '{DOWN}' is not understood (nor 1 more)"),
    "a prefix": (renamed("model.", "language_model.model."), "tensor 'model.embed_tokens.weight' is missing"),
    "a vision tower": (
        lambda made: made.tensors.update(VISION),
        "tensor 'multi_modal_projector.linear_1.weight' is not understood (nor 1 more)",
    ),
    "a head beside tied embeddings": (keys(tie_word_embeddings=True), "tensor 'lm_head.weight' is not understood"),
    "no head": (without("lm_head.weight"), "tensor 'lm_head.weight' is missing"),
}  # fmt: skip

SPOILT = {"channel": FP8, "group": PACKED, "modelopt": FUSED, "plain": PLAINLY}


@pytest.mark.parametrize(("form", "case"), [(form, case) for form, cases in SPOILT.items() for case in cases])
def test_refused(form: str, case: str, tmp_path: Path) -> None:
    made = FORMS[form]()
    spoil, message = SPOILT[form][case]
    spoil(made)
    assert message in refusal(made, tmp_path).message


HINTS = {
    ("group", "zero points"): "quantise symmetrically",
    ("group", "g_idx"): "actorder",
    ("channel", "scales by block"): "by block",
    ("channel", "inverse scales"): "by block",
    ("modelopt", "inverse scale"): "by block",
    ("plain", "a head beside tied embeddings"): "tie_word_embeddings",
}


@pytest.mark.parametrize(("form", "case"), HINTS)
def test_hint(form: str, case: str, tmp_path: Path) -> None:
    made = FORMS[form]()
    SPOILT[form][case][0](made)
    assert HINTS[form, case] in str(refusal(made, tmp_path).hint)


EXPERTS_MIXED = {
    "FP8 and plain": (TENSOR, PLAIN),
    "FP8 by tensor and by channel": (TENSOR, CHANNEL),
    "FP8 and INT4": (CHANNEL, INT4),
    "INT4 in two groups": (INT4, Way("group", 8)),
}


@pytest.mark.parametrize("case", EXPERTS_MIXED)
def test_experts_in_two_forms(case: str, tmp_path: Path) -> None:
    """Also where the declaration says so."""
    most, one = EXPERTS_MIXED[case]
    made = sound(most)
    replaced(EXPERT, one)(made)
    made.ways[EXPERT] = one
    message = refusal(declare_compressed_tensors(made), tmp_path).message
    assert f"{EXPERT}.weight" in message and "is stored in another way than" in message


def test_fused_experts_in_two_forms(tmp_path: Path) -> None:
    made = modelopt()
    made.tensors[DOWN] = made.values[DOWN]
    del made.tensors[f"{DOWN}_weight_scale"]
    assert made.beside is not None
    made.beside["quantization"]["exclude_modules"].append(DOWN)
    assert f"'{DOWN}' is stored in another way than" in refusal(made, tmp_path).message


def test_a_plain_router_though_all_linears_are_declared(tmp_path: Path) -> None:
    """It is no Linear in some versions of transformers; a quantised one that is declared is taken as well."""
    made = sound(CHANNEL)
    made.raw["quantization_config"]["ignore"].remove(ROUTER)
    made.raw["quantization_config"]["config_groups"]["group_0"]["targets"].append("Linear")
    assert match(made, tmp_path / "plain").linears[f"{ROUTER}.weight"].form == "none"
    replaced(ROUTER, CHANNEL)(made)
    assert match(made, tmp_path / "quantised").linears[f"{ROUTER}.weight"].form == "channel"


def test_one_channel_by_channel(tmp_path: Path) -> None:
    """Its scale is one number, as that of a tensor is."""
    raw = RAW | {"num_local_experts": 1, "num_experts_per_tok": 1}
    made = handmade(raw, random_weights(parsed(raw)), lambda name: CHANNEL)
    assert match(declare_compressed_tensors(made), tmp_path).linears[f"{ROUTER}.weight"].form == "tensor"


def test_int4_of_inputs_that_do_not_fill_the_last_integer(tmp_path: Path) -> None:
    made = sound(INT4)
    made.raw["hidden_size"] = 36
    for name, tensor in random_weights(parsed(RAW | {"hidden_size": 36})).items():
        if name in made.tensors:
            made.tensors[name] = tensor
    made.tensors |= {P: torch.zeros(64, 5, dtype=torch.int32), S: torch.ones(64, 3), SHAPE: torch.tensor([64, 36])}
    error = refusal(made, tmp_path)
    assert f"'{P}' is I32 [64, 5]; INT4 weights [64, 36]" in error.message and "multiple of eight" in str(error.hint)


def test_a_true_shape_of_32_bits(tmp_path: Path) -> None:
    made = sound(INT4)
    change(SHAPE, lambda t: t.int())(made)
    assert match(made, tmp_path).linears[W].form == "group"


def test_int4_by_channel(tmp_path: Path) -> None:
    """One group spans the channel, however long it is: that is declared without a size, or as groups of that size."""
    made = sound(Way("group", 32))
    by_channel = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}
    made.raw["quantization_config"]["config_groups"]["group_0"]["weights"] = by_channel
    others = [name for name, way in made.ways.items() if way.form == "group" and made_inputs(made, name) != 32]
    message = refusal(made, tmp_path / "some in two groups").message
    assert f"'{others[0]}' is stored as INT4 in groups of 32, but config.json declares it as INT4 by channel" in message


def made_inputs(made: Handmade, module: str) -> int:
    return made.tensors[f"{module}.weight_packed"].shape[1] * 8


def test_four_bits_lie_as_the_contract_says() -> None:
    """Golden: -8 .. 7 from the lowest nibble up, as compressed-tensors packs them."""
    assert packed(torch.arange(-8, 8)[None]).tolist() == [[0x76543210, 0xFEDCBA98 - 2**32]]


def test_spoiling_spoils(tmp_path: Path) -> None:
    """The refusals are not of the checkpoint that they begin with."""
    for form in SPOILT:
        assert match_weights(open_checkpoint(FORMS[form]().write(tmp_path / form)))
