"""``plan`` under recipes: by hand, and against the exporter's own table, module by module."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shuntyard.engines.plan import Request, plan
from shuntyard.engines.plan.answer import plan_model
from shuntyard.engines.plan.budget import read_model
from shuntyard.engines.plan.footprint import SCALES, kv_cache
from shuntyard.errors import UnsupportedError
from shuntyard.exporter.recipe import SHIPPED, read_recipe
from shuntyard.exporter.recipe_table import recipe_table
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.engines.test_plan import ATTENTION, EXPERT_ROWS, MAVERICK_MODEL, ONE_EXPERT, SCOUT, SCOUT_MODEL, model_of
from tests.sizes import MODELS
from tests.sizes import raw_config as full_size
from tests.sparse import write_sparse

MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"


def test_recipes_by_hand() -> None:
    held = {name: SCOUT_MODEL.held(name).total for name in SHIPPED}
    routed = 48 * 16 * ONE_EXPERT
    routers = 48 * 16 * 5120  # the graph computes them in fp32: 2 bytes more each
    assert held["bf16"] == 2 * SCOUT + 2 * routers == 215_547_586_560
    # fp8 spares the first and the last layer.
    expert = ONE_EXPERT - 4 * EXPERT_ROWS  # what one in FP8, with a scale for each row, takes less
    assert held["fp8"] == held["bf16"] - 46 * 16 * expert == 123_000_662_016  # 114.6 GiB: more than an H100
    assert held["fp8-ffn"] == held["fp8"] - 46 * expert
    attention = ATTENTION - 4 * (5120 + 2 * 1024 + 5120)
    assert held["fp8-all-linear"] == held["bf16"] - 48 * (17 * expert + attention)
    assert held["int4-experts"] == held["bf16"] - 2 * routed + routed // 2 + routed // 128 * 2 == 72_102_389_760
    # Maverick's first layer has a dense FFN, and no experts.
    maverick = {name: MAVERICK_MODEL.held(name).total for name in SHIPPED}
    assert maverick["bf16"] - maverick["fp8"] == 23 * 128 * expert
    dense = 3 * 5120 * 16_384 - 4 * (2 * 16_384 + 5120)
    assert maverick["fp8"] - maverick["fp8-ffn"] == 23 * expert + 23 * dense


def write_recipe(folder: Path, *rules: str) -> str:
    """The path of a recipe file of these rules, each some lines of TOML."""
    path = folder / "own.toml"
    path.write_text("".join(f"[[rule]]\n{rule}\n" for rule in rules))
    return str(path)


def test_recipe_files_by_hand(tmp_path: Path) -> None:
    recipe = write_recipe(
        tmp_path,
        'modules = "*.0.feed_forward.experts"\nweights = "int4"\ngroup_size = 64',
        'modules = "*.1.feed_forward.experts"\nweights = "fp8"\nactivations = "fp8-static"\ngranularity = "tensor"',
        'modules = "*.q_proj"\nweights = "fp8"\nactivations = "fp8-static"',
        'modules = "*.k_proj"\nweights = "fp32"',
        'modules = ["*.v_proj", "*.router"]\nweights = "fp16"',
    )
    held = SCOUT_MODEL.held(recipe)
    stored = 2 * 46 * 16 * ONE_EXPERT  # of all other layers
    assert held.of("routed experts") == {
        "INT4": 16 * ONE_EXPERT // 2,
        "F8_E4M3": 16 * ONE_EXPERT,
        "BF16": stored,
        SCALES: 16 * ONE_EXPERT // 64 * 2 + 16 * 3 * (4 + 4),
    }
    assert held.of("attention q, o") == {
        "F8_E4M3": 48 * 5120 * 5120,
        "BF16": 48 * 2 * 5120 * 5120,
        SCALES: 48 * (5120 + 1) * 4,
    }
    assert held.of("attention k, v") == {"F32": 48 * 4 * 1024 * 5120, "F16": 48 * 2 * 1024 * 5120}
    assert held.of("routers") == {"F32": 48 * 4 * 16 * 5120}
    assert held.of("shared experts") == {"BF16": 48 * 2 * ONE_EXPERT}
    answer = plan_model(SCOUT_MODEL, Request(weights=recipe, gpu="b300"))
    assert (answer.asked.kv, answer.asked.weights) == ("bf16", recipe)


def test_a_recipes_cache_counts(tmp_path: Path) -> None:
    rule = 'modules = "model.layers.{}.self_attn"\nkv_cache = "fp8"'
    everywhere = write_recipe(tmp_path, rule.format("*"), 'modules = "nowhere"\nweights = "bf16"')
    far = Request(weights=everywhere, gpus=4, gpu="h200", context=10_485_760)
    for kv, item in ((None, 1), ("fp8", 1), ("bf16", 2)):
        answer = plan_model(SCOUT_MODEL, replace(far, kv=kv))
        assert answer.asked.kv == {1: "fp8", 2: "bf16"}[item]
        assert answer.budget.cache == kv_cache(SCOUT_MODEL.config, 1, 10_485_760, item, gpus=4)
        assert ("rule 2: 'nowhere' matches no module" in answer.notes) is True
        assert any("takes no FP8" in note for note in answer.notes) == (item == 1)
    with pytest.raises(UnsupportedError, match="gpu 'a100-80' is sm80"):
        plan_model(SCOUT_MODEL, Request(weights=everywhere, gpu="a100-80"))
    # Another recipe does not bring the cache along.
    near = plan_model(SCOUT_MODEL, Request(weights=everywhere)).nearest
    assert [change.what for change in near if "--weights" in change.what] == ["--weights int4-experts --kv fp8"]
    (change,) = (change for change in near if "--weights" in change.what)
    again = plan_model(SCOUT_MODEL, Request(weights="int4-experts", kv="fp8"))
    assert again.budget == change.budget
    (tmp_path / "some").mkdir()
    some = write_recipe(tmp_path / "some", rule.format("?"))
    with pytest.raises(UnsupportedError, match="own.toml: the KV cache is fp8 in 10 of 48 layers") as caught:
        plan_model(SCOUT_MODEL, Request(weights=some))
    assert caught.value.hint is not None and "--kv fp8" in caught.value.hint
    assert plan_model(SCOUT_MODEL, Request(weights=some, kv="bf16")).asked.kv == "bf16"


def test_recipes_are_refused_as_by_the_exporter(tmp_path: Path) -> None:
    model = model_of(parsed(raw_config()))
    for weights, words in (
        ("int4-experts", "rule 1: 'model.layers.1.feed_forward.experts' has 32 inputs, no multiple of group_size 128"),
        ("int3", "int3: no such recipe"),
        (str(tmp_path), "no such recipe"),
        (write_recipe(tmp_path, 'modules = "lm_head"\nweight = "fp8"'), "rule 1: key 'weight' is not known"),
    ):
        with pytest.raises(UnsupportedError, match=re.escape(words)) as caught:
            plan_model(model, Request(weights=weights))
        assert caught.value.hint


def test_what_no_rule_matches_counts_as_stored(tmp_path: Path) -> None:
    config = parsed(raw_config(attention_bias=True))
    model = model_of(config, "F32")
    recipe = write_recipe(tmp_path, 'modules = ["lm_head", "*.experts"]\nweights = "fp32"')
    stored, held = model.held("stored"), model.held(recipe)
    changed = {component for component, _ in {*stored.weights.items()} ^ {*held.weights.items()}}
    assert changed == {("lm_head", "BF16"), ("lm_head", "F32")}
    assert held.of("lm_head") == {"F32": 4 * config.vocab_size * config.hidden_size}


def test_experts_of_several_types_need_a_rule(tmp_path: Path) -> None:
    """As in export: a recipe may bring a layer's plain experts into one type."""
    raw = raw_config()
    weights = random_weights(parsed(raw), dtype=torch.bfloat16)
    for name in [name for name in weights if ".experts." in name]:
        module, _, which = name.rpartition(".")
        for i, matrix in enumerate(weights.pop(name)):
            kinds = {"down_proj": ("down_proj",), "gate_up_proj": ("gate_proj", "up_proj")}[which]
            for kind, part in zip(kinds, matrix.T.chunk(len(kinds)), strict=True):
                own = torch.float32 if (module, i) == ("model.layers.3.feed_forward.experts", 2) else torch.bfloat16
                weights[f"{module}.{i}.{kind}.weight"] = part.contiguous().to(own)
    path = write_checkpoint(tmp_path / "mixed", raw, weights)
    one_layer = write_recipe(tmp_path, 'modules = "*.1.feed_forward.experts"\nweights = "fp8"')
    for recipe in ("stored", one_layer):
        with pytest.raises(UnsupportedError, match="must all be stored alike"):
            plan(path, Request(weights=recipe))
    assert plan(path, Request(weights="fp8")).model.held("fp8").total == model_of(parsed(raw)).held("fp8").total


@pytest.mark.parametrize("recipe", ["stored", *SHIPPED])
@pytest.mark.parametrize("name", ["miniature", "scout", "maverick", "maverick-fp8"])
def test_bytes_are_those_of_the_recipe_table(name: str, recipe: str, full_size_checkpoints: dict[str, Path]) -> None:
    """Module by module, as ``shuntyard precision`` has them; but routers, which engines hold in fp32."""
    path = full_size_checkpoints[name]
    table = recipe_table(path, read_recipe(recipe))
    held = read_model(path, recipe).held(recipe)
    ours_by_module: dict[str, int] = {}
    for (module, _, _), count in held.pieces.items():
        ours_by_module[module] = ours_by_module.get(module, 0) + count
    rows = {row.module: row.nbytes for row in table.rows}
    routers = {module for module in rows if module.endswith(".router")}
    assert {row.stored for row in table.rows if row.module in routers} == {"bf16"}
    wanted = {module: count * (2 if module in routers else 1) for module, count in rows.items()}
    assert ours_by_module == wanted | {"": table.other_bytes}
    assert held.total == table.nbytes + sum(rows[module] for module in routers)


@pytest.fixture(scope="module")
def full_size_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("sparse")
    forms = {"scout": ("scout", "bf16"), "maverick": ("maverick", "bf16"), "maverick-fp8": ("maverick", "fp8-meta")}
    found = {name: write_sparse(folder / name, full_size(MODELS[own], form)) for name, (own, form) in forms.items()}
    return {"miniature": MINIATURE, **found}
