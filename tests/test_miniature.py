"""The trained miniature: what its record says is measured again, with transformers, on a part of the held-out text."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

np = pytest.importorskip("numpy")
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

MINIATURE = Path(__file__).resolve().parent.parent / "examples" / "miniature"
EVERY = 3
"""Every so many windows are measured again."""


def _json(name: str) -> Any:
    return json.loads((MINIATURE / name).read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def record() -> Any:
    return _json("training.json")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenizers.Tokenizer.from_file(str(MINIATURE / "tokenizer.json"))


@dataclass(frozen=True)
class Measured:
    """Windows of the held-out text as the model sees them now."""

    windows: list[int]
    tokens: Any
    nll: list[float]
    shares: Any
    """By layer and expert, of all tokens that went through the router."""


@contextmanager
def _routed(model: Any) -> Iterator[list[Any]]:
    """Collects the expert that each token goes to, for every call of every router."""
    chosen: list[Any] = []
    layers = [model.model.layers[i].feed_forward for i in model.config.moe_layers]
    handles = [
        # Scores are the sigmoid of a logit for the chosen expert and 0 for all others.
        layer.router.register_forward_hook(lambda _module, _args, out: chosen.append(out[0].argmax(dim=1)))
        for layer in layers
    ]
    yield chosen
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="module")
def measured(record: Any, tokenizer: Any) -> Measured:
    model = transformers.Llama4ForCausalLM.from_pretrained(MINIATURE, dtype=torch.float32).eval()
    text = (MINIATURE / "held_out.txt").read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer.encode(text, add_special_tokens=False).ids)
    assert len(tokens) == record["held_out_text"]["tokens"]
    pieces = tokens.split(record["window"] - 1)
    assert len(pieces) == len(record["window_nll"])
    windows = list(range(0, len(pieces), EVERY))
    begin = torch.tensor([model.config.bos_token_id])
    losses = []
    loads = torch.zeros(len(model.config.moe_layers), model.config.num_local_experts, dtype=torch.int64)
    with torch.inference_mode(), _routed(model) as chosen:
        for i in windows:
            chosen.clear()
            logits = model(torch.cat([begin, pieces[i]])[None], use_cache=False).logits[0, :-1]
            losses.append(float(torch.nn.functional.cross_entropy(logits.double(), pieces[i], reduction="sum")))
            loads += torch.stack([experts.bincount(minlength=loads.shape[1]) for experts in chosen])
    shares = loads / loads.sum(dim=1, keepdim=True)
    return Measured(windows, torch.cat([pieces[i] for i in windows]), losses, shares)


def test_it_is_small() -> None:
    files = [file for file in MINIATURE.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert len(list(MINIATURE.glob("*.safetensors"))) == 2


def test_every_feature_is_on() -> None:
    config = _json("config.json")
    assert (config["architectures"], config["model_type"]) == (["Llama4ForCausalLM"], "llama4_text")
    assert config["use_qk_norm"] and config["attn_temperature_tuning"] and not config["tie_word_embeddings"]
    assert 0 in config["no_rope_layers"] and 1 in config["no_rope_layers"]
    assert set(config["layer_types"]) == {"chunked_attention", "full_attention"}
    assert 0 < len(config["moe_layers"]) < config["num_hidden_layers"]
    assert set(config["moe_layers"]) & {i for i, rope in enumerate(config["no_rope_layers"]) if not rope}
    assert config["num_local_experts"] > config["num_experts_per_tok"] == 1
    assert config["num_attention_heads"] > config["num_key_value_heads"] > 1
    assert config["rope_parameters"]["rope_type"] == "llama3"
    # Windows cross chunks, and the temperature has several steps within the positions that it was trained at.
    assert config["attention_chunk_size"] * 8 <= config["max_position_embeddings"]
    assert config["floor_scale"] * 8 <= config["max_position_embeddings"]
    assert config["attn_scale"] > 0


def test_the_weights_are_bf16_and_all_there() -> None:
    safetensors = pytest.importorskip("safetensors")
    index = _json("model.safetensors.index.json")["weight_map"]
    found: dict[str, str] = {}
    for shard in MINIATURE.glob("*.safetensors"):
        with safetensors.safe_open(shard, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118, the file is not a mapping
                tensor = file.get_tensor(name)
                assert tensor.dtype == torch.bfloat16, name
                assert tensor.isfinite().all(), name
                found[name] = shard.name
    assert found == index


def test_the_rope_scaling_does_something() -> None:
    """Some of the frequencies are kept and some are slowed, so that an exporter cannot ignore either."""
    config = transformers.AutoConfig.from_pretrained(MINIATURE)
    rope = transformers.models.llama4.modeling_llama4.Llama4TextRotaryEmbedding(config)
    plain = config.rope_parameters["rope_theta"] ** -(torch.arange(0, config.head_dim, 2) / config.head_dim)
    ratio = plain / rope.inv_freq
    factor = config.rope_parameters["factor"]
    is_kept, is_slowed = torch.isclose(ratio, torch.tensor(1.0)), torch.isclose(ratio, torch.tensor(factor))
    assert is_kept.any() and is_slowed.any() and (is_kept | is_slowed).all()


def test_the_text_is_the_recorded_one(record: Any) -> None:
    data = (MINIATURE / "held_out.txt").read_bytes()
    assert hashlib.sha256(data).hexdigest() == record["held_out_text"]["sha256"]
    assert 200_000 <= len(data) <= 400_000


def test_the_recorded_perplexity_is_that_of_its_windows(record: Any) -> None:
    mean = sum(record["window_nll"]) / record["held_out_text"]["tokens"]
    assert math.exp(mean) == pytest.approx(record["perplexity"], rel=1e-4)


def test_the_perplexity_is_the_recorded_one(record: Any, measured: Measured) -> None:
    """fp32 sums in another order move a logit by 1e-5 or so, which is far below the tolerances.

    What they allow for is a token whose two best experts tie to the last bits: it may go to the other expert on
    another machine, and its own loss may then move by a nat or two: 4e-3 of a nat per token of a window of 511. The
    mean over all windows is held tighter, since few windows can be so unlucky.
    """
    recorded = [record["window_nll"][i] for i in measured.windows]
    for now, then in zip(measured.nll, recorded, strict=True):
        assert now == pytest.approx(then, abs=2.0)
    perplexity = math.exp(sum(measured.nll) / len(measured.tokens))
    assert perplexity == pytest.approx(math.exp(sum(recorded) / len(measured.tokens)), rel=5e-4)


def test_it_has_learned(record: Any, measured: Measured) -> None:
    unigram = _json("unigram.json")
    counts = np.array(unigram["counts"])
    assert counts.sum() == unigram["tokens"] == record["train_text"]["tokens"]
    chances = (counts[measured.tokens.numpy()] + 1) / (unigram["tokens"] + len(counts))
    of_unigrams = math.exp(-np.log(chances).mean())
    perplexity = math.exp(sum(measured.nll) / len(measured.tokens))
    assert perplexity < of_unigrams / 5


def test_every_expert_has_work(record: Any, measured: Measured) -> None:
    assert measured.shares.shape == (4, 8)
    assert float(measured.shares.min()) >= 0.03
    for shares, recorded in zip(measured.shares, record["expert_shares"].values(), strict=True):
        assert shares.numpy() == pytest.approx(np.array(recorded), abs=0.05)


@given(text=st.text())
def test_texts_come_back(tokenizer: Any, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert all(0 <= i < tokenizer.get_vocab_size() for i in ids)


def test_both_loaders_read_the_tokenizer(tokenizer: Any) -> None:
    config = _json("config.json")
    auto = transformers.AutoTokenizer.from_pretrained(MINIATURE)
    assert tokenizer.get_vocab_size() == len(auto) == config["vocab_size"]
    text = "In the beginning … “naïve” Ω 🜁\n\n\ttabs  and   blanks\r\n"
    ids = auto(text)["input_ids"]
    assert ids == tokenizer.encode(text).ids
    assert ids[0] == config["bos_token_id"] == auto.bos_token_id
    assert auto.decode(ids, skip_special_tokens=True) == text
    assert (auto.eos_token_id, auto.pad_token_id) == (config["eos_token_id"], config["pad_token_id"])
