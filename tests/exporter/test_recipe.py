"""Recipes: what is refused, which rule counts for which module, and what that means in bytes."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.errors import UnsupportedError
from shuntyard.exporter.config import Llama4Config
from shuntyard.exporter.modules import Module, attentions, modules
from shuntyard.exporter.precision import products_of
from shuntyard.exporter.recipe import (
    PLAIN,
    SHIPPED,
    STORED,
    Precision,
    Recipe,
    Resolved,
    nbytes,
    parse_recipe,
    read_recipe,
    resolve,
)
from shuntyard.exporter.recipe_table import layers_in_words, recipe_table
from tests import sizes
from tests.checkpoints import parsed, raw_config, write_checkpoint
from tests.sparse import write_sparse

CONFIG = parsed(raw_config())  # 4 layers, routed ones are 1 and 3
MINIATURE = Path(__file__).parents[2] / "examples" / "miniature"


def recipe(*rules: str, name: str = "own", where: str = "own.toml") -> Recipe:
    """A recipe of rules, each in TOML."""
    return parse_recipe("".join(f"[[rule]]\n{rule}\n" for rule in rules).encode(), name, where)


def rule(modules: object, **keys: object) -> str:
    return "\n".join(f"{key} = {json.dumps(value)}" for key, value in ({"modules": modules} | keys).items())


def config_of(model: str) -> Llama4Config:
    return parsed(sizes.raw_config(sizes.MODELS[model], "bf16-text"))


class TestReading:
    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("[[rule", "own.toml: cannot be read as TOML: "),
            ('[[rule]]\nmodules = "a"\nmodules = "b"\nweights = "fp8"', "own.toml: cannot be read as TOML: "),
            ("a = " + "[" * 100_000, "own.toml: cannot be read as TOML: "),
            ("", "own.toml: key 'rule' is missing"),
            ("rule = []", "own.toml: key 'rule' "),
            ("rule = 3", "own.toml: key 'rule' should be a valid tuple"),
            ('[rule]\nmodules = "a"\nweights = "fp8"', "own.toml: key 'rule' should be a valid tuple"),
            ("rule = [3]", "own.toml: rule 1: should be a valid dict"),
            ('rules = 1\n[[rule]]\nmodules = "a"\nweights = "fp8"', "own.toml: key 'rules' is not known"),
            ('description = 3\n[[rule]]\nmodules = "a"\nweights = "fp8"', "own.toml: key 'description' should be"),
        ],
    )
    def test_no_recipe(self, text: str, message: str) -> None:
        with pytest.raises(UnsupportedError) as caught:
            parse_recipe(text.encode(), "own", "own.toml")
        assert caught.value.message.startswith(message) and caught.value.hint
        assert "\n" not in caught.value.message

    def test_no_text(self) -> None:
        with pytest.raises(UnsupportedError, match="cannot be read as TOML: 'utf-8' codec can't decode"):
            parse_recipe(b"\xff\xfe[[rule]]", "own", "own.toml")

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({}, "says neither weights nor kv_cache"),
            ({"weight": "fp8"}, "key 'weight' is not known"),
            ({"Weights": "fp8"}, "key 'Weights' is not known"),
            ({"weights": "fp4"}, "key 'weights' should be .*, not 'fp4'"),
            ({"weights": "FP8"}, "key 'weights' should be .*, not 'FP8'"),
            ({"weights": "stored"}, "key 'weights' should be .*, not 'stored'"),
            ({"weights": 8}, "key 'weights' should be "),
            ({"weights": "fp8", "activations": "fp8"}, "key 'activations' should be .*, not 'fp8'"),
            ({"weights": "fp8", "activations": "dynamic"}, "key 'activations' should be .*, not 'dynamic'"),
            ({"weights": "fp8", "granularity": "block"}, "key 'granularity' should be .*, not 'block'"),
            ({"weights": "fp8", "granularity": "group"}, "granularity group does not go with weights fp8"),
            ({"weights": "int4", "granularity": "channel"}, "granularity channel does not go with weights int4"),
            ({"weights": "int4", "granularity": "tensor"}, "granularity tensor does not go with weights int4"),
            ({"weights": "bf16", "granularity": "tensor"}, "granularity tensor does not go with weights bf16"),
            ({"weights": "fp8", "group_size": 128}, "group_size goes with weights int4"),
            ({"weights": "bf16", "group_size": 128}, "group_size goes with weights int4"),
            ({"weights": "int4", "group_size": 12}, "is a multiple of 8"),
            ({"weights": "int4", "group_size": 4}, "is a multiple of 8"),
            ({"weights": "int4", "group_size": 0}, "key 'group_size' should be greater than 0"),
            ({"weights": "int4", "group_size": -8}, "key 'group_size' should be greater than 0"),
            ({"weights": "int4", "group_size": "128"}, "key 'group_size' should be a valid integer"),
            ({"weights": "int4", "group_size": 128.0}, "key 'group_size' should be a valid integer"),
            ({"weights": "int4", "group_size": True}, "key 'group_size' should be a valid integer"),
            ({"weights": "int4", "activations": "fp8-dynamic"}, "activations fp8-dynamic need weights fp8, not int4"),
            ({"weights": "bf16", "activations": "fp8-static"}, "activations fp8-static need weights fp8, not bf16"),
            ({"activations": "fp8-static"}, "says neither weights nor kv_cache"),
            ({"kv_cache": "fp8", "activations": "fp8-static"}, "need weights beside them"),
            ({"kv_cache": "fp8", "activations": "none"}, "need weights beside them"),
            ({"kv_cache": "fp8", "granularity": "tensor"}, "need weights beside them"),
            ({"kv_cache": "fp8", "group_size": 8}, "need weights beside them"),
            ({"kv_cache": "int8"}, "key 'kv_cache' should be .*, not 'int8'"),
            ({"kv_cache": True}, "key 'kv_cache' should be "),
            ({"modules": "", "weights": "fp8"}, "modules has an empty pattern"),
            ({"modules": ["a", " "], "weights": "fp8"}, "modules has an empty pattern"),
            ({"modules": [], "weights": "fp8"}, "key 'modules' "),
            ({"modules": 3, "weights": "fp8"}, "key 'modules' should be "),
            ({"modules": ["a", 3], "weights": "fp8"}, "key 'modules' should be a valid string"),
            ({"modules": {"a": "b"}, "weights": "fp8"}, "key 'modules' "),
        ],
    )
    def test_rules(self, keys: dict[str, Any], message: str) -> None:
        """Refused by the rule's number and the key."""
        given = {"modules": "lm_head"} | keys
        inline = "".join(f"\n{k} = " + json.dumps(v).replace('{"a": ', "{a = ") for k, v in given.items())
        with pytest.raises(UnsupportedError, match=f"^own.toml: rule 2:? ?{'.*' if ' ' in message else ''}{message}"):
            parse_recipe(f"[[rule]]\n{rule('a', weights='bf16')}\n[[rule]]{inline}".encode(), "own", "own.toml")

    def test_modules_are_needed(self) -> None:
        with pytest.raises(UnsupportedError, match="rule 1: key 'modules' is missing"):
            recipe('weights = "fp8"')

    def test_defaults(self) -> None:
        made = recipe(rule("a", weights="fp8"), rule(["a"], weights="int4"), rule("a", weights="fp16"))
        assert [r.precision for r in made.rules] == [
            Precision("fp8", "channel", "none", 0),
            Precision("int4", "group", "none", 128),
            Precision("fp16", "", "none", 0),
        ]
        assert [str(r.precision) for r in made.rules] == ["fp8 channel", "int4 group 128", "fp16"]

    def test_names(self, tmp_path: Path) -> None:
        for name in SHIPPED:
            assert not read_recipe(name).is_a_file and read_recipe(name).rules
        assert read_recipe(STORED).rules == () and not read_recipe(STORED).is_a_file
        for name in ("nothing.toml", str(tmp_path), "fp8.toml", "", "a\0b", "FP8"):
            with pytest.raises(UnsupportedError, match="no such recipe"):
                read_recipe(name)
        with pytest.raises(UnsupportedError, match="cannot be read: File name too long"):
            read_recipe("a" * 5000)

    @pytest.mark.parametrize("name", ["stored", "fp8", "own"])
    def test_a_file_is_a_file_whatever_it_is_called(self, tmp_path: Path, name: str) -> None:
        """Somebody wrote it, and wants to know of rules that match nothing."""
        path = tmp_path / f"{name}.toml"
        path.write_text(f"[[rule]]\n{rule('lm_haed', weights='fp8')}\n")
        found = read_recipe(path)
        assert found.is_a_file and found.name == name and found.where == str(path)
        assert found.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        table = recipe_table(write_checkpoint(tmp_path / "checkpoint", raw_config()), found)
        assert table.warnings[0] == "rule 1: 'lm_haed' matches no module"


def becomes(made: Recipe, config: Llama4Config = CONFIG) -> dict[str, str]:
    return {name: own.weights for name, own in resolve(made, config).precision.items()}


class TestResolving:
    def test_the_first_that_matches_counts(self) -> None:
        found = becomes(recipe(rule("lm_head", weights="fp32"), rule("lm_*", weights="fp8"), rule("*", weights="bf16")))
        assert found["lm_head"] == "fp32" and found["model.layers.0.self_attn.q_proj"] == "bf16"

    def test_first_and_last(self) -> None:
        made = recipe(
            rule("model.layers.last.self_attn.*", weights="fp8"), rule("model.layers.first.*", weights="fp16")
        )
        found = becomes(made)
        assert {n for n, w in found.items() if w == "fp8"} == {f"model.layers.3.self_attn.{x}_proj" for x in "qkvo"}
        assert {n.split(".")[2] for n, w in found.items() if w == "fp16"} == {"0"}
        one = parsed(raw_config(num_hidden_layers=1))
        both = becomes(recipe(rule("*.last.*", weights="fp8"), rule("*.first.*", weights="fp16")), one)
        assert {w for n, w in both.items() if "layers" in n} == {"fp8"}  # one layer is both

    def test_numbers_are_whole(self) -> None:
        config = parsed(raw_config(num_hidden_layers=12))
        found = becomes(recipe(rule("model.layers.1.*", weights="fp8")), config)
        assert {n.split(".")[2] for n, w in found.items() if w == "fp8"} == {"1"}
        assert {
            n.split(".")[2] for n, w in becomes(recipe(rule("model.layers.last.*", weights="fp8")), config).items()
            if w == "fp8"
        } == {"11"}  # fmt: skip

    def test_routers_and_embeddings_are_passed_over(self) -> None:
        found = becomes(recipe(rule("*", weights="fp8"), rule("model.embed_tokens", weights="fp16")))
        assert {n for n, w in found.items() if w == STORED} == {f"model.layers.{i}.feed_forward.router" for i in (1, 3)}
        assert found["model.embed_tokens"] == "fp16"

    @pytest.mark.parametrize(
        ("modules", "weights", "why"),
        [
            ("model.embed_tokens", "fp8", "is looked up, and stays plain"),
            ("model.embed_*", "int4", "is looked up, and stays plain"),
            ("*.router", "fp8", "computes in fp32 always"),
            ("*.router", "bf16", "computes in fp32 always"),
        ],
    )
    def test_a_rule_for_them_alone_is_refused(self, modules: str, weights: str, why: str) -> None:
        made = recipe(rule("lm_head", weights="bf16"), rule(modules, weights=weights))
        with pytest.raises(UnsupportedError, match=f"own.toml: rule 2: '.*' cannot be {weights}: it {why}"):
            resolve(made, CONFIG)

    def test_tied_embeddings(self) -> None:
        """There is no head: a rule for it matches nothing, and what is looked up stays plain."""
        config = parsed(raw_config(tie_word_embeddings=True))
        found = resolve(recipe(rule("lm_head", weights="fp8"), rule("*", weights="fp8")), config)
        assert "lm_head" not in found.precision and found.precision["model.embed_tokens"].weights == STORED
        assert found.unused == ("rule 1: 'lm_head' matches no module",)

    def test_unused(self) -> None:
        made = recipe(
            rule(["model.layers.*", "model.layers.0.*", "lm_head"], weights="fp8"),
            rule(["lm_head", "nothing"], weights="bf16"),
            rule("*.self_attn", kv_cache="fp8"),
            rule(["model.layers.0.self_attn", "*.self_attn.q_proj"], kv_cache="compute"),
        )
        assert resolve(made, CONFIG).unused == (
            "rule 2: 'lm_head' matches nothing that an earlier rule left",
            "rule 2: 'nothing' matches no module",
            "rule 4: 'model.layers.0.self_attn' matches nothing that an earlier rule left",
            "rule 4: '*.self_attn.q_proj' matches nothing that an earlier rule left",
        )

    def test_half_a_rule_may_be_unused(self) -> None:
        made = recipe(rule("*.self_attn", weights="fp8", kv_cache="fp8"), rule("*", weights="bf16"))
        found = resolve(made, CONFIG)
        assert found.precision["model.layers.0.self_attn.q_proj"].weights == "bf16"
        assert found.unused == ("rule 1: '*.self_attn', for its weights, matches nothing that an earlier rule left",)
        with pytest.raises(UnsupportedError, match="rule 1: kv_cache is of attentions, and its modules match none"):
            resolve(recipe(rule("*.self_attn.*_proj", weights="bf16", kv_cache="fp8")), CONFIG)

    def test_a_tied_head_has_the_embedding_s_type(self) -> None:
        found = resolve(recipe(rule("*", weights="fp32")), parsed(raw_config(tie_word_embeddings=True)))
        assert products_of(found)["lm_head"] == "fp32"

    def test_caches(self) -> None:
        made = recipe(
            rule("model.layers.last.self_attn", kv_cache="compute"),
            rule("model.layers.*", weights="fp8", activations="fp8-static", kv_cache="fp8"),
        )
        found = resolve(made, CONFIG)
        assert found.kv_cache == {f"model.layers.{i}.self_attn": "fp8" if i < 3 else "compute" for i in range(4)}
        assert set(attentions(CONFIG)[:3]) < set(found.needs_calibration)
        assert "model.layers.1.feed_forward.experts" in found.needs_calibration
        assert attentions(CONFIG)[3] not in found.needs_calibration

    @pytest.mark.parametrize(("size", "fits"), [(8, True), (16, False), (24, False), (128, False)])
    def test_groups_that_do_not_divide(self, size: int, fits: bool) -> None:
        """Experts of 32 and 24 inputs."""
        made = recipe(rule("*.experts", weights="int4", group_size=size))
        if fits:
            assert resolve(made, CONFIG).precision["model.layers.1.feed_forward.experts"].group_size == size
            return
        bad = 24 if size == 16 else 32
        with pytest.raises(
            UnsupportedError, match=f"rule 1: .*1.feed_forward.experts' has {bad} inputs, no multiple"
        ) as e:
            resolve(made, CONFIG)
        assert e.value.hint == "group_size = 8"

    def test_groups_that_no_size_divides(self) -> None:
        config = parsed(raw_config(intermediate_size_mlp=36))
        with pytest.raises(UnsupportedError, match="0.feed_forward.down_proj' has 36 inputs") as caught:
            resolve(recipe(rule("*.feed_forward.*", weights="int4", group_size=8)), config)
        assert "no group size divides it" in caught.value.hint

    def test_groups_of_what_an_earlier_rule_took_do_not_matter(self) -> None:
        made = recipe(rule("*.experts", weights="bf16"), rule("*.feed_forward.*", weights="int4", group_size=8))
        resolve(made, CONFIG)
        with pytest.raises(UnsupportedError, match="rule 2: .*shared_expert.gate_proj' has 32 inputs"):
            resolve(recipe(rule("*.experts", weights="bf16"), rule("*.shared_expert.*", weights="int4")), CONFIG)


PARTS = ("model", "layers", "first", "last", "0", "1", "3", "*", "self_attn", "q_proj", "feed_forward", "experts",
         "lm_*", "router", "shared_expert", "[13]", "?", "*_proj", "embed_tokens", "lm_head")  # fmt: skip
PATTERNS = st.one_of(
    st.sampled_from(["*", "lm_head", "*.experts", "*.self_attn", "*.self_attn.*", "model.layers.first.*",
                     "model.layers.last.*", "model.layers.1.*", "*down_proj", "model.*"]),
    st.lists(st.sampled_from(PARTS), min_size=1, max_size=5).map(".".join),
)  # fmt: skip
WEIGHTS: list[dict[str, object]] = [
    {"weights": "fp8", "activations": "fp8-dynamic"},
    {"weights": "fp8", "granularity": "tensor", "activations": "fp8-static"},
    {"weights": "int4", "group_size": 8},
    {"weights": "bf16"},
    {"weights": "fp32", "kv_cache": "compute"},
    {"weights": "fp8", "kv_cache": "fp8"},
    {"kv_cache": "fp8"},
    {"kv_cache": "compute"},
]
RULES = st.lists(
    st.tuples(st.lists(PATTERNS, min_size=1, max_size=3), st.sampled_from(WEIGHTS)), min_size=1, max_size=5
)
CONFIGS = [
    CONFIG,
    parsed(raw_config(num_hidden_layers=1, interleave_moe_layer_step=1)),
    parsed(raw_config(num_hidden_layers=12, tie_word_embeddings=True, interleave_moe_layer_step=3)),
]


def matches(name: str, patterns: list[str], layers: int) -> bool:
    """By regular expressions, with a number in place of a pattern's word."""
    for pattern in patterns:
        for words in ({}, {"first": "0"}, {"last": f"{layers - 1}"}):
            own = ".".join(words.get(part, part) for part in pattern.split("."))
            if re.fullmatch(fnmatch.translate(own), name):
                return True
    return False


@given(RULES, st.sampled_from(CONFIGS))
@settings(max_examples=300)
def test_resolving_is_what_it_is_said_to_be(
    asked: list[tuple[list[str], dict[str, object]]], config: Llama4Config
) -> None:
    """Against a search for the first rule, written apart, from the last rule on."""
    layers = config.num_hidden_layers
    expected = {m.name: (Precision(), 0) for m in modules(config)}
    caches = dict.fromkeys(attentions(config), ("compute", 0))
    refused = False
    for number, (patterns, keys) in reversed(list(enumerate(asked, 1))):
        hit = [m for m in modules(config) if "weights" in keys and matches(m.name, patterns, layers)]
        can = [m for m in hit if m.kind != "router" and (m.kind != "embedding" or keys["weights"] in PLAIN)]
        refused |= bool(hit) and not can
        precision = recipe(rule("*", **keys)).rules[0].precision if "weights" in keys else None
        expected |= {m.name: (precision, number) for m in can if precision is not None}
        if "kv_cache" in keys:
            attended = [n for n in caches if matches(n, patterns, layers)]
            refused |= not attended
            caches |= {n: (str(keys["kv_cache"]), number) for n in attended}
    made = recipe(*(rule(patterns, **keys) for patterns, keys in asked))
    if refused:
        with pytest.raises(UnsupportedError, match="cannot be|kv_cache is of attentions"):
            resolve(made, config)
        return
    found = resolve(made, config)
    numbers = {**{n: r for n, (_, r) in expected.items()}, **{n: r for n, (_, r) in caches.items()}}
    assert found.precision == {name: own for name, (own, _) in expected.items()}
    assert found.kv_cache == {name: kind for name, (kind, _) in caches.items()}
    assert found.rule_of == {name: number for name, number in numbers.items() if number}


def count(found: Resolved) -> dict[str, int]:
    """How many modules of each kind become what."""
    kinds: dict[str, int] = {}
    for module in found.modules:
        key = f"{module.kind} {found.precision[module.name]}"
        kinds[key] = kinds.get(key, 0) + 1
    return kinds


FP8 = "fp8 channel, inputs dynamic"


class TestShipped:
    """What the shipped recipes mean for the released models, counted by hand."""

    @pytest.mark.parametrize("name", SHIPPED)
    @pytest.mark.parametrize("model", ["scout", "maverick"])
    def test_every_module_is_named(self, name: str, model: str) -> None:
        found = resolve(read_recipe(name), config_of(model))
        assert {m.kind for m in found.modules if found.precision[m.name].weights == STORED} == {"router"}
        assert not found.unused or name in ("fp8", "fp8-ffn")
        assert not found.needs_calibration and set(found.kv_cache.values()) == {"compute"}

    @pytest.mark.parametrize(
        ("name", "model", "expected"),
        [
            ("bf16", "scout", {"linear bf16": 48 * 7 + 1, "experts bf16": 48}),
            ("fp8", "scout", {"linear bf16": 48 * 7 + 1, "experts bf16": 2, f"experts {FP8}": 46}),
            # Maverick's first layer is dense; its last one is routed.
            ("fp8", "maverick", {"linear bf16": 48 * 7 + 1, "experts bf16": 1, f"experts {FP8}": 23}),
            ("fp8-ffn", "scout", {"linear bf16": 48 * 4 + 1 + 6, f"linear {FP8}": 46 * 3, "experts bf16": 2,
                                  f"experts {FP8}": 46}),
            ("fp8-ffn", "maverick", {"linear bf16": 48 * 4 + 1 + 6, f"linear {FP8}": 46 * 3, "experts bf16": 1,
                                     f"experts {FP8}": 23}),
            ("fp8-all-linear", "scout", {"linear bf16": 1, f"linear {FP8}": 48 * 7, f"experts {FP8}": 48}),
            ("fp8-all-linear", "maverick", {"linear bf16": 1, f"linear {FP8}": 48 * 7, f"experts {FP8}": 24}),
            ("int4-experts", "scout", {"linear bf16": 48 * 7 + 1, "experts int4 group 128": 48}),
            ("int4-experts", "maverick", {"linear bf16": 48 * 7 + 1, "experts int4 group 128": 24}),
        ],
    )  # fmt: skip
    def test_released(self, name: str, model: str, expected: dict[str, int]) -> None:
        routers = 48 if model == "scout" else 24
        found = count(resolve(read_recipe(name), config_of(model)))
        assert found == {"embedding bf16": 1, "router stored": routers} | expected

    def test_behemoth(self) -> None:
        """Its experts' assumed width is no multiple of 128."""
        for name in SHIPPED[:-1]:
            resolve(read_recipe(name), config_of("behemoth"))
        with pytest.raises(UnsupportedError, match="0.feed_forward.experts' has 24000 inputs") as caught:
            resolve(read_recipe("int4-experts"), config_of("behemoth"))
        assert caught.value.hint == "group_size = 64"

    def test_the_miniature(self) -> None:
        """Layers 1 and 3 of 4 are routed; the last one stays bf16."""
        config = parsed(json.loads((MINIATURE / "config.json").read_text()))
        routed = [i for i in range(config.num_hidden_layers) if config.is_moe(i)]
        last = config.num_hidden_layers - 1
        found = resolve(read_recipe("fp8"), config)
        fp8 = {n for n, own in found.precision.items() if own.weights == "fp8"}
        assert fp8 == {f"model.layers.{i}.feed_forward.experts" for i in routed if i not in (0, last)} and fp8
        assert recipe_table(MINIATURE, read_recipe("fp8")).nbytes < recipe_table(MINIATURE, read_recipe("bf16")).nbytes

    def test_bytes_of_scout(self, tmp_path: Path) -> None:
        """A sparse checkpoint of full size: what is stored, and what each recipe leaves of it."""
        path = write_sparse(tmp_path / "scout", sizes.raw_config(sizes.MODELS["scout"], "bf16"))
        hidden, inner, experts, layers, vocabulary = 5120, 8192, 16, 48, 202048
        routed = layers * experts * 3 * hidden * inner
        attention = layers * (2 * 5120 * hidden + 2 * 1024 * hidden)
        shared, routers, ends = layers * 3 * hidden * inner, layers * experts * hidden, 2 * vocabulary * hidden
        norms = (2 * layers + 1) * hidden
        everything = 2 * (routed + attention + shared + routers + ends + norms)
        assert everything == pytest.approx(215.5e9, rel=1e-3)  # as the Hub says, without the vision tower
        scales = experts * (2 * inner + hidden)  # a layer's
        of_linears = 2 * 5120 + 2 * 1024 + 2 * inner + hidden
        saved = {
            "bf16": 0,
            "fp8": 46 * (routed // layers - 4 * scales),
            "fp8-ffn": 46 * ((routed + shared) // layers - 4 * (scales + 2 * inner + hidden)),
            "fp8-all-linear": routed + attention + shared - 4 * layers * (scales + of_linears),
            "int4-experts": routed * 3 // 2 - 2 * routed // 128,
        }
        for name, wanted in saved.items():
            table = recipe_table(path, read_recipe(name))
            assert (table.bytes_stored, table.nbytes) == (everything, everything - wanted), name
            assert table.other_bytes == 2 * norms and table.warnings == ()
            assert table.nbytes == table.other_bytes + sum(row.nbytes for row in table.rows)
        assert recipe_table(path, read_recipe(STORED)).nbytes == everything


@given(st.sampled_from(["tensor", "channel"]), st.booleans(), st.integers(1, 5), st.integers(1, 99), st.integers(1, 99))
def test_bytes_of_fp8(form: str, static: bool, copies: int, out: int, into: int) -> None:
    module = Module("m", "experts", 0, ((out, into), (into, out)), copies)
    weights, scales = nbytes(module, Precision("fp8", form, "fp8-static" if static else "fp8-dynamic"))
    assert weights == 2 * copies * out * into
    assert scales == 4 * copies * ((out + into if form == "channel" else 2) + (2 if static else 0))


@given(st.sampled_from([8, 16, 128]), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9))
def test_bytes_of_int4(group: int, copies: int, out: int, groups: int) -> None:
    module = Module("m", "experts", 0, ((out, group * groups),), copies)
    assert nbytes(module, Precision("int4", "group", "none", group)) == (
        copies * out * group * groups // 2,
        2 * copies * out * groups,
    )


@pytest.mark.parametrize(
    ("layers", "words"),
    [([], ""), ([0], "0"), ([0, 1, 2, 5], "0-2, 5"), ([1, 3], "1, 3"), ([1, 3, 5, 7], "1, 3 .. 7"), ([0, 1], "0-1"),
     ([1, 3, 4], "1, 3-4"), ([0, 2, 4, 5], "0, 2, 4-5")],
)  # fmt: skip
def test_layers_in_words(layers: list[int], words: str) -> None:
    assert layers_in_words(layers) == words
