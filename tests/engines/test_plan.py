"""``plan``'s arithmetic, against figures worked out by hand and against the exporter's and the engines' own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shuntyard.engines import build
from shuntyard.engines.manifest import Limits, load_manifest
from shuntyard.engines.plan import Request, parse_tokens, plan
from shuntyard.engines.plan.activations import Call, largest_live_set, live_sets, workspace
from shuntyard.engines.plan.answer import plan_model
from shuntyard.engines.plan.budget import DEFAULT_CONTEXT, Model, check_request, read_model
from shuntyard.engines.plan.footprint import (
    SCALES,
    kv_cache,
    parameters,
    possible_gpus,
    stored_bytes,
    weights_per_gpu,
)
from shuntyard.engines.plan.gpus import GIB
from shuntyard.errors import CheckpointError, UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import modules
from shuntyard.exporter.parameters import all_weights
from tests.checkpoints import parsed, raw_config
from tests.sizes import MODELS
from tests.sizes import raw_config as full_size
from tests.sparse import write_sparse

HIDDEN, VOCABULARY, EXPERT, DENSE, LAYERS = 5120, 202_048, 8192, 16_384, 48

ONE_EXPERT = 3 * 5120 * 8192  # gate, up, down: 125,829,120
ATTENTION = 2 * 5120 * 40 * 128 + 2 * 5120 * 8 * 128  # q, o and k, v of a layer: 62,914,560
EXPERT_ROWS = 2 * 8192 + 5120  # outputs of gate, up and down, each with its scale
OUTER = 2 * 202_048 * 5120 + (2 * 48 + 1) * 5120  # embeddings, lm_head, norms: 2,069,468,160

SCOUT = OUTER + 48 * (ATTENTION + 16 * 5120 + (16 + 1) * ONE_EXPERT)
MAVERICK = OUTER + 48 * ATTENTION + 24 * (128 * 5120 + (128 + 1) * ONE_EXPERT) + 24 * 3 * 5120 * 16_384


def config_of(name: str) -> Llama4Config:
    return parsed(full_size(MODELS[name], "bf16-text"))


ITEM = {"BF16": 2, "F16": 2, "F32": 4}


def model_of(config: Llama4Config, dtype: str = "BF16") -> Model:
    """A model in bf16, or in another type, without files."""
    tensors = [(name, dtype, ITEM[dtype] * _count(shape)) for name, shape in all_weights(config).items()]
    return Model(Path("model"), config, stored_bytes(config, tensors))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for n in shape:
        count *= n
    return count


SCOUT_MODEL, MAVERICK_MODEL = model_of(config_of("scout")), model_of(config_of("maverick"))


def test_parameters_by_hand() -> None:
    assert (SCOUT, MAVERICK) == (107_769_861_120, 400_711_848_960)
    assert sum(parameters(config_of("scout")).values()) == SCOUT
    assert sum(parameters(config_of("maverick")).values()) == MAVERICK
    assert parameters(config_of("scout")) == {
        "embeddings": 1_034_485_760,
        "attention q, o": 48 * 2 * 5120 * 5120,
        "attention k, v": 48 * 2 * 5120 * 1024,
        "routed experts": 48 * 16 * 125_829_120,
        "shared experts": 48 * 125_829_120,
        "routers": 48 * 16 * 5120,
        "norms": 97 * 5120,
        "lm_head": 1_034_485_760,
    }


def test_published_counts_are_those_with_the_vision_tower(tmp_path: Path) -> None:
    """108.6 and 401.6 billion parameters, 202 and 748 GiB, 112 and 388 GiB with routed experts in FP8."""
    vision = 871_932_416  # of both models
    assert round((SCOUT + vision) / 1e9, 1) == 108.6
    assert round((MAVERICK + vision) / 1e9, 1) == 401.6
    for name, count, bf16, fp8 in (("scout", SCOUT, 202, 112), ("maverick", MAVERICK, 748, 388)):
        read = read_model(write_sparse(tmp_path / name, full_size(MODELS[name], "bf16")))
        assert (read.stored.total, read.stored.vision) == (2 * count, 2 * vision)
        assert round((2 * count + 2 * vision) / GIB) == bf16
        # Meta's FP8 checkpoint of Maverick spares no experts, nor does the 112 GiB that is said of Scout.
        spared = (2 if name == "scout" else 1) * read.config.num_local_experts * (ONE_EXPERT - 4 * EXPERT_ROWS)
        assert round((read.held("fp8").total - spared + 2 * vision) / GIB) == fp8


@pytest.mark.parametrize(
    ("name", "form", "routed"),
    [
        # FP8 and an fp32 or bf16 scale for each row: 2 x 8192 rows of gate and up, 5120 of down.
        ("maverick", "fp8-meta", 24 * 128 * 125_829_120),
        ("scout", "fp8-modelopt", 48 * 16 * 125_829_120),
    ],
)
def test_quantised_files_are_counted_as_they_are(name: str, form: str, routed: int, tmp_path: Path) -> None:
    read = read_model(write_sparse(tmp_path / name, full_size(MODELS[name], form)))
    experts = read.stored.of("routed experts")
    assert experts["F8_E4M3"] == routed
    assert 0 < experts[SCALES] < routed // 1000
    assert read.stored.of("embeddings") == {"BF16": 2 * VOCABULARY * HIDDEN}
    attention = read.stored.of("attention q, o")
    assert set(attention) == ({"BF16"} if form == "fp8-meta" else {"F8_E4M3", SCALES})
    files = sum(file.stat().st_size for file in read.path.glob("*.safetensors"))
    headers = files - read.stored.total - read.stored.vision - read.stored.waived
    assert 0 < headers < 10_000_000


@pytest.mark.parametrize(
    ("context", "naive", "chunked"),
    [
        (1_000_000, 196_608_000_000, 50_359_959_552),
        (1_048_576, 206_158_430_208, 52_747_567_104),
        (10_000_000, 1_966_080_000_000, 492_727_959_552),
        (10_485_760, 2_061_584_302_080, 516_604_035_072),
    ],
)
def test_caches_by_hand(context: int, naive: int, chunked: int) -> None:
    """A row is 8 heads x 128 x keys and values x 2 bytes = 4096; 12 of 48 layers hold the context, 36 a chunk."""
    cache = kv_cache(config_of("scout"), 1, context, 2)
    assert cache.naive == naive == 48 * context * 4096
    assert cache.local_bytes + cache.global_bytes == chunked == 12 * context * 4096 + 36 * 8192 * 4096
    narrow = kv_cache(config_of("scout"), 3, context, 1)
    assert narrow.local_bytes + narrow.global_bytes == 3 * chunked // 2
    # Eight GPUs have a key/value head each; sixteen would have one each, too, every head twice.
    assert kv_cache(config_of("scout"), 1, context, 2, gpus=8).naive == naive // 8
    assert kv_cache(config_of("scout"), 1, context, 2, gpus=16).naive == naive // 8


def test_activations_by_hand() -> None:
    """Scout, one sequence, 512 tokens a call, a context of 2**20."""
    live = largest_live_set(config_of("scout"), Call(batch=1, tokens=512, context=2**20))
    assert live.stage == "attention of a NoPE layer"
    terms = {term.name: term.nbytes for term in live.terms}
    assert terms == {
        "keys, values of each query head": 2 * 40 * 2**20 * 128 * 2,  # 20 GiB
        "q, k, v": 512 * (40 + 8 + 8) * 128 * 2,
        "scaled q": 512 * 40 * 128 * 2,
        "hidden state": 512 * 5120 * 2,
        "mask of RoPE layers": 512 * 8192 * 2,
        "mask of NoPE layers": 512 * 2**20 * 2,  # 1 GiB
        "cos, sin": 512 * 128 * 4,
        "ids, positions, indices": 512 * (32 + 24 * 8 + 4 * 48),
        "logits": 202_048 * 4,
    }
    for tokens, in_call in ((100, 100), (8192, 8192), (8193, 8192)):  # a call ends at a chunk's edge
        (head,) = (live for live in live_sets(config_of("scout"), Call(1, tokens, 2**20)) if live.stage == "head")
        assert {term.name: term.nbytes for term in head.terms}["normalised"] == in_call * 5120 * 2
    every = largest_live_set(config_of("scout"), Call(batch=1, tokens=512, context=2**20, all_logits=True))
    assert every.nbytes - live.nbytes == 511 * 202_048 * 4
    # With short contexts it is the head: room for the logits of every token.
    head = largest_live_set(config_of("scout"), Call(batch=64, tokens=512, context=512))
    assert head.stage == "head"
    terms = {term.name: term.nbytes for term in head.terms}
    assert terms["logits of all tokens, bf16"] == 64 * 512 * 202_048 * 2
    assert terms["hidden state"] == terms["normalised"] == 64 * 512 * 5120 * 2


def test_several_gpus_by_hand() -> None:
    config = config_of("maverick")
    held = MAVERICK_MODEL.held("bf16")
    whole, eighth = weights_per_gpu(config, held, 1), weights_per_gpu(config, held, 8)
    assert sum(whole.values()) == held.total
    assert eighth["routed experts"] == 24 * 16 * ONE_EXPERT * 2
    assert eighth["attention k, v"] == 48 * 2 * 5120 * 128 * 2
    assert eighth["embeddings"] == 202_048 // 8 * 5120 * 2
    assert (eighth["norms"], eighth["routers"]) == (whole["norms"], whole["routers"])
    # Scales of experts go with them; those of a matrix that is cut by columns may be needed on every GPU.
    quantised = weights_per_gpu(config, MAVERICK_MODEL.held("fp8-all-linear"), 8)
    rows = 2 * 8192 + 5120
    assert quantised["routed experts"] == 24 * 16 * (ONE_EXPERT + rows * 4)
    assert quantised["shared experts"] == 24 * (ONE_EXPERT // 8 + rows * 4)
    assert possible_gpus(config) == [1, 2, 4, 8]  # 40 query heads, 8 key/value heads, 128 experts
    assert 16 not in possible_gpus(config_of("scout"))


def test_what_an_engine_makes_of_stored_weights() -> None:
    """As plans for sm89 were measured: of fp32 weights, experts and embeddings stay fp32; routers become it."""
    config = parsed(raw_config())
    for dtype in ("BF16", "F16", "F32"):
        held, counts = model_of(config, dtype).held("stored"), parameters(config)
        wide = {component for (component, own) in held.weights if own == "F32"}
        assert wide == ({"routers"} if dtype != "F32" else {"routers", "routed experts", "embeddings"})
        assert held.total == sum((4 if component in wide else 2) * count for component, count in counts.items())


shapes = st.fixed_dictionaries(
    {
        "hidden_size": st.sampled_from([32, 128, 256]),
        "intermediate_size": st.sampled_from([128, 384]),
        "intermediate_size_mlp": st.sampled_from([128, 640]),
        "vocab_size": st.integers(1, 999),
        "num_hidden_layers": st.integers(1, 9),
        "num_attention_heads": st.sampled_from([8, 16]),
        "num_key_value_heads": st.sampled_from([1, 2, 4, 8]),
        "head_dim": st.sampled_from([2, 16]),
        "num_local_experts": st.sampled_from([4, 8, 12]),
        "interleave_moe_layer_step": st.integers(1, 3),
        "no_rope_layer_interval": st.integers(1, 5),
        "attention_chunk_size": st.sampled_from([None, 8, 100]),
        "tie_word_embeddings": st.booleans(),
        "attention_bias": st.booleans(),
        "max_position_embeddings": st.integers(1, 5000),
    }
)
configs = shapes.map(lambda changes: parsed(raw_config(**changes)))


@given(configs)
def test_parameters_are_the_models(config: Llama4Config) -> None:
    """Of any shape: as its dimensions say, and every tensor has a component."""
    model = model_of(config)
    hidden, biases = config.hidden_size, config.attention_bias
    queries, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layers, moe = config.num_hidden_layers, len(config.moe_layers)
    wanted = {
        "embeddings": config.vocab_size * hidden,
        "attention q, o": layers * (2 * hidden * queries + biases * (queries + hidden)),
        "attention k, v": layers * 2 * keys * (hidden + biases),
        "routed experts": moe * config.num_local_experts * 3 * hidden * config.intermediate_size,
        "shared experts": moe * 3 * hidden * config.intermediate_size,
        "dense FFN": (layers - moe) * 3 * hidden * config.intermediate_size_mlp,
        "routers": moe * config.num_local_experts * hidden,
        "norms": (2 * layers + 1) * hidden,
        "lm_head": 0 if config.tie_word_embeddings else config.vocab_size * hidden,
    }
    assert parameters(config) == {name: count for name, count in wanted.items() if count}
    assert model.stored.total == 2 * sum(wanted.values())
    assert sum(model.stored.pieces.values()) == model.stored.total
    assert {module for module, _, _ in model.stored.pieces} == {"", *(module.name for module in modules(config))}
    assert (model.stored.vision, model.stored.waived) == (0, 0)


@given(configs, st.integers(1, 3), st.data())
def test_caches_are_those_of_engines(config: Llama4Config, batch: int, data: st.DataObject) -> None:
    context = data.draw(st.integers(1, config.max_position_embeddings))
    limits = Limits(max_batch=8, max_context=context, max_tokens=1, chunk=config.attention_chunk_size)
    built = build._cache_shapes(config, limits)
    values = 2 * batch * sum(shape.heads * shape.rows * shape.head_dim for shape in built)
    cache = kv_cache(config, batch, context, 2)
    assert cache.local_bytes + cache.global_bytes == 2 * values


def test_the_cache_of_a_built_engine(engine_directory: Path, checkpoint: Path) -> None:
    manifest = load_manifest(engine_directory)
    cache = kv_cache(read_model(checkpoint).config, 1, manifest.limits.max_context, 4)
    rows = {(shape.layer, shape.rows) for shape in manifest.cache}
    assert {count for _, count in rows} == {cache.local_rows, cache.global_rows}
    assert cache.local_bytes + cache.global_bytes == sum(2 * 4 * s.heads * s.rows * s.head_dim for s in manifest.cache)


def test_defaults_are_those_of_build() -> None:
    assert build.DEFAULT_CONTEXT == DEFAULT_CONTEXT
    assert build.Request().max_tokens == Request().tokens


def test_unknown_or_missing_tensors_are_refused() -> None:
    config = parsed(raw_config())
    tensors = [(name, "BF16", 2 * _count(shape)) for name, shape in all_weights(config).items()]
    for odd in ("model.layers.0.mystery.weight", "mystery"):
        with pytest.raises(UnsupportedError, match=odd):
            stored_bytes(config, [*tensors, (odd, "BF16", 2)])
    with pytest.raises(CheckpointError, match="the tensors of lm_head hold 0 values"):
        stored_bytes(config, [entry for entry in tensors if entry[0] != "lm_head.weight"])
    with pytest.raises(CheckpointError, match="the tensors of dense FFN hold"):
        stored_bytes(config, [*tensors, ("model.layers.0.feed_forward.extra_proj.weight", "BF16", 2)])
    with pytest.raises(UnsupportedError, match="is F64"):
        stored_bytes(config, [*tensors, ("lm_head.weight", "F64", 8)])
    beside = [("model.layers.1.self_attn.rotary_emb.inv_freq", "F32", 16), ("vision_model.x", "BF16", 6)]
    prefixed = [(f"language_model.{name}", dtype, nbytes) for name, dtype, nbytes in tensors]
    found = stored_bytes(config, prefixed + beside)
    assert (found.total, found.waived, found.vision) == (stored_bytes(config, tensors).total, 16, 6)


@pytest.mark.parametrize(
    ("text", "tokens"), [("8192", 8192), ("128k", 131_072), ("128K", 131_072), ("1M", 1_048_576), ("10M", 10_485_760)]
)
def test_tokens_are_read(text: str, tokens: int) -> None:
    assert parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5M", "1m", "8 192", "8,192", "1G", "k", "١", "9" * 13])
def test_other_tokens_are_not(text: str) -> None:
    with pytest.raises(ValueError, match="is no number of tokens"):
        parse_tokens(text)


def test_contexts_reach_as_far_as_the_models() -> None:
    for model, longest in ((SCOUT_MODEL, "10M"), (MAVERICK_MODEL, "1M")):
        most = parse_tokens(longest)
        assert model.config.max_position_embeddings == most
        assert check_request(model, Request(context=most)).context == most
        with pytest.raises(UnsupportedError, match=f"a context of {most + 1:,} is beyond"):
            check_request(model, Request(context=most + 1))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "h1000"}, "gpu 'h1000' is not known"),
        ({"gpus": 3}, "3 GPUs cannot share 8 key/value heads"),
        ({"gpus": 16}, "16 GPUs cannot share 40 query heads"),
        ({"gpus": 0}, "0 GPUs"),
        ({"batch": 0}, "batch is 0"),
        ({"batch": 2**30 + 1}, "batch is 1073741825"),
        ({"tokens": 0}, "tokens is 0"),
        ({"context": 0}, "context is 0"),
        ({"weights": "int3"}, "int3: no such recipe"),
        ({"kv": "fp4"}, "a KV cache in 'fp4' is not known"),
        ({"reserve": -1}, "the reserve is negative"),
        (
            {"gpu": "a100-80", "weights": "fp8"},
            "gpu 'a100-80' is sm80, for which TensorRT compiles nothing that holds FP8",
        ),
        ({"gpu": "a100-40", "kv": "fp8"}, "gpu 'a100-40' is sm80"),
    ],
)
def test_requests_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words) as caught:
        plan_model(SCOUT_MODEL, Request(**changes))
    assert caught.value.hint


@given(configs, st.integers(1, 9), st.integers(1, 600), st.data())
def test_live_sets_cover_what_a_stage_reads_and_writes(
    config: Llama4Config, batch: int, tokens: int, data: st.DataObject
) -> None:
    context = data.draw(st.integers(1, config.max_position_embeddings))
    call = Call(batch, tokens, context)
    largest = largest_live_set(config, call)
    stages = {live.stage: live for live in live_sets(config, call)}
    assert largest.nbytes == max(live.nbytes for live in stages.values())
    new = min(tokens, context, config.attention_chunk_size or context)
    for live in stages.values():
        assert live.nbytes >= batch * new * config.hidden_size * 2 + 4 * batch * config.vocab_size
    if config.moe_layers:
        rows = batch * new * config.num_experts_per_tok
        scratch = workspace(batch * new, config.num_experts_per_tok, config.hidden_size, config.intermediate_size)
        assert (
            scratch % 256 == 0
            and 0 <= scratch - 192 * 1024 - 2 * rows * (config.hidden_size + config.intermediate_size) < 512
        )
    has_nope = not all(config.uses_rope(i) for i in range(config.num_hidden_layers))
    assert ("attention of a NoPE layer" in stages) == has_nope
    assert ("routed experts" in stages) == bool(config.moe_layers)


def test_torch_is_not_needed(checkpoint: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from shuntyard.engines.plan import Request, plan;"
        "plan(Path(sys.argv[1]), Request()); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, checkpoint], check=False).returncode == 0


def test_json_has_everything_in_bytes(checkpoint: Path) -> None:
    answer = plan(checkpoint, Request(gpu="rtx4090", context=100))
    found = answer.as_dict()
    per_gpu = found["per_gpu"]
    total = sum(per_gpu["weights"].values()) + per_gpu["cache"]["local"] + per_gpu["cache"]["global"]
    total += sum(term["nbytes"] for term in per_gpu["activations"]["terms"]) + per_gpu["reserve"]
    assert total == per_gpu["needed"] == per_gpu["usable"] - per_gpu["left"]
    assert (found["fits"], found["reason"], found["nearest"]) == (True, None, [])
    assert found["asked"]["gpu"] == "rtx4090"
