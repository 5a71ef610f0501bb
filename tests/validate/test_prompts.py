"""Prompts: what is in the sets, what a file may hold, and tokens that all go to one expert."""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shuntyard.engines.text import Tokenizer
from shuntyard.errors import EngineError
from shuntyard.exporter.config import Llama4Config
from shuntyard.validate import prompts
from shuntyard.validate.demo import held_out_text, miniature
from shuntyard.validate.eager import EagerStack
from shuntyard.validate.one_way import OneWay, one_way, spread
from shuntyard.validate.prompts import BUILT_IN, built_in, from_jsonl, from_text, not_exercised
from shuntyard.validate.stack import Stack
from shuntyard.validate.values import Array, LayerValues, Sequence, Tokens
from tests.checkpoints import parsed, random_text, raw_config, write_checkpoint, write_tokenizer
from tests.parity.cases import models


class FakeStack(Stack):
    """Routers that look at the token alone, or at its place too: ``token % E``, in ``restless`` models ``+ place``."""

    label, dtype = "fake", "fp32"

    def __init__(self, config: Llama4Config, restless: frozenset[int] = frozenset()) -> None:
        self.config, self.restless, self.layers_run = config, restless, 0

    def embed(self, sequences: Listed[Tokens]) -> Iterator[Array]:
        for tokens in sequences:
            yield tokens[:, None].astype(np.float32)

    def layer(self, index: int, hidden: Listed[Array]) -> Iterator[LayerValues]:
        self.layers_run += 1
        experts = self.config.num_local_experts
        for tokens in hidden:
            ids = tokens[:, 0].astype(int)
            moved = np.array([token in self.restless for token in ids]) & (np.arange(len(ids)) > 0)
            router = np.zeros((len(ids), experts), np.float32)
            router[np.arange(len(ids)), (ids + moved) % experts] = 1 + ids % 7
            none = np.zeros((len(ids), 1), np.float32)
            yield LayerValues(none, none, none, none, tokens, none, none, router if self.config.is_moe(index) else None)

    def head(self, hidden: Listed[Array]) -> Iterator[Array]:
        raise NotImplementedError


def lengths(sequences: list[Sequence], word: str) -> list[int]:
    return [len(sequence.tokens) for sequence in sequences if sequence.label.startswith(word)]


@settings(max_examples=60)
@given(
    raw=models(),
    longest=st.integers(1, 80),
    cap=st.integers(1, 80),
    names=st.lists(st.sampled_from(BUILT_IN), unique=True),
    has_text=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sets_stay_within_vocabulary_and_context_and_are_the_same_again(
    raw: dict[str, Any], longest: int, cap: int, names: list[str], has_text: bool, seed: int
) -> None:
    config = parsed(raw)
    random = np.random.default_rng(seed)
    text = random.integers(0, config.vocab_size, random.integers(1, 200)).tolist() if has_text else None

    def make(names: list[str]) -> tuple[list[Sequence], list[str]]:
        pick = functools.partial(one_way, FakeStack(config))
        return built_in(names, config, longest=longest, text_tokens=text, pick_one_way=pick, cap=cap)

    sequences, notes = make(names)
    for sequence in sequences:
        assert sequence.tokens.dtype == np.int64
        assert 1 <= len(sequence.tokens) <= min(longest, cap)
        assert sequence.tokens.min() >= 0 and sequence.tokens.max() < config.vocab_size
        assert sequence.label.endswith(f"({len(sequence.tokens)} token{'s' * (len(sequence.tokens) > 1)})")
    assert len({sequence.label for sequence in sequences}) == len(sequences)
    # The same again, set by set.
    apart = [make([name]) for name in names]
    again = [sequence for part, _ in apart for sequence in part]
    assert [(s.label, s.tokens.tolist()) for s in sequences] == [(s.label, s.tokens.tolist()) for s in again]
    assert notes == [note for _, part in apart for note in part]
    if text is not None and "long" in names:
        assert next(s.tokens[0] for s in sequences if s.label.startswith("long")) == text[0]


def test_sets_hold_what_they_are_called_after() -> None:
    config = parsed(raw_config(attention_chunk_size=16, floor_scale=24, vocab_size=64))
    sequences, notes = built_in(BUILT_IN, config, longest=1000)
    assert [s.label for s in sequences if s.label.startswith(("chunk", "past"))] == [
        "chunk edge -1 (15 tokens)",
        "chunk edge (16 tokens)",
        "chunk edge +1 (17 tokens)",
        "past two chunk edges (40 tokens)",
    ]
    assert lengths(sequences, "short") == [1, 2, 3, 5, 8, 13, 16]
    assert lengths(sequences, "long") == [56]  # 3.5 chunks; and 2 * 24 positions are behind it
    assert notes == ["set 'adversarial': no sequence that all goes to one expert was looked for"]
    again = next(s for s in sequences if "again and again, over a chunk's edge" in s.label)
    assert len(set(again.tokens.tolist())) == 1 and len(again.tokens) == 24
    turn = next(s for s in sequences if "in turn, over a chunk's edge" in s.label)
    assert Counter(turn.tokens.tolist()).most_common() == [(int(turn.tokens[0]), 12), (int(turn.tokens[1]), 12)]
    ends = next(s for s in sequences if s.label.startswith("last and first"))
    assert set(ends.tokens.tolist()) == {0, 63}
    assert not_exercised(config, sequences) == []


def test_long_reaches_two_steps_of_the_temperature() -> None:
    config = parsed(raw_config(attention_chunk_size=16, floor_scale=100))
    sequences, _ = built_in(["long"], config, longest=1000)
    assert lengths(sequences, "long") == [208]
    assert lengths(built_in(["long"], config, longest=1000, cap=60)[0], "long") == [60]
    unbounded = parsed(raw_config(attention_chunk_size=None, attn_temperature_tuning=False))
    assert lengths(built_in(["long"], unbounded, longest=10**6)[0], "long") == [prompts.LONGEST]


@pytest.mark.parametrize(
    ("longest", "made"),
    [
        (14, []),
        (15, ["chunk edge -1 (15 tokens)"]),
        (16, ["chunk edge -1 (15 tokens)", "chunk edge (16 tokens)"]),
        (17, ["chunk edge -1 (15 tokens)", "chunk edge (16 tokens)", "chunk edge +1 (17 tokens)"]),
        (30, ["chunk edge +1 (17 tokens)", "past one chunk edge, cut to what fits (30 tokens)"]),
        (33, ["chunk edge +1 (17 tokens)", "past two chunk edges, cut to what fits (33 tokens)"]),
    ],
)
def test_chunk_is_cut_to_the_context(longest: int, made: list[str]) -> None:
    config = parsed(raw_config(attention_chunk_size=16))
    sequences, notes = built_in(["chunk"], config, longest=longest)
    assert [s.label for s in sequences][-len(made) or 99 :] == made
    assert notes == ([] if made else ["set 'chunk': a chunk is 16 tokens, 14 fit; its edge is not exercised"])


def test_a_model_without_chunks_or_experts_is_noted() -> None:
    config = parsed(raw_config(attention_chunk_size=None, moe_layers=[]))
    stack = FakeStack(config)
    sequences, notes = built_in(["chunk", "adversarial"], config, longest=50, pick_one_way=lambda n: one_way(stack, n))
    assert notes == [
        "set 'chunk': the model has no chunks",
        "set 'adversarial': the model has no experts, so none that all tokens could go to",
    ]
    assert len(sequences) == 4


def test_text_is_used_and_said_to_be_short() -> None:
    config = parsed(raw_config(attention_chunk_size=8, vocab_size=64))
    text = [7, *range(10, 30)]
    sequences, notes = built_in(["short", "long"], config, longest=100, text_tokens=text)
    assert all(s.tokens[0] == 7 for s in sequences)
    assert sequences[2].tokens.tolist() == [7, 11, 12]  # goes on behind the two-token sequence
    assert notes == ["set 'long': the text has 21 tokens, too few for it: it is repeated"]
    with pytest.raises(EngineError, match=r"gives token 64, the model's vocabulary has 64"):
        built_in(["short"], config, longest=100, text_tokens=[1, 64])
    with pytest.raises(EngineError, match="the text has no tokens"):
        built_in(["short"], config, longest=100, text_tokens=[])
    with pytest.raises(EngineError, match="no set of prompts 'shrot'"):
        built_in(["shrot"], config, longest=100)


def test_what_no_sequence_reaches_is_noted() -> None:
    config = parsed(raw_config(attention_chunk_size=16, floor_scale=24))
    made = [Sequence("a", np.zeros(n, np.int64)) for n in (3, 16)]
    edge, temperature = not_exercised(config, made)
    assert edge == "not exercised: the edge of a chunk (16 tokens); give a longer --length"
    assert temperature == "not exercised: temperature tuning (from 24 tokens on); give a longer --length"
    assert not_exercised(config, [*made, Sequence("b", np.zeros(17, np.int64))]) == [temperature]
    assert not_exercised(config, [Sequence("b", np.zeros(24, np.int64))]) == []


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("words")
    (folder / "config.json").write_text(json.dumps({"bos_token_id": 3}))
    write_tokenizer(folder, 64)
    return Tokenizer.from_directory(folder)


def test_windows_follow_each_other(words: Tokenizer) -> None:
    text = random_text(30, 64)
    ids = words.encode(text)
    first, second = from_text(text, words, windows=2, length=10, vocab_size=64)
    assert first.tokens.tolist() == ids[:10] and second.tokens.tolist() == [3, *ids[10:19]]
    assert second.label == "text 2 (10 tokens)"
    assert len(from_text(text, words, windows=9, length=10, vocab_size=64)) == 3  # as many as there are
    with pytest.raises(EngineError, match="the text has 31 tokens, a window takes 32"):
        from_text(text, words, windows=1, length=32, vocab_size=64)
    with pytest.raises(EngineError, match="windows of 3 tokens are too short"):
        from_text(text, words, windows=1, length=3, vocab_size=64)
    with pytest.raises(EngineError, match="tokenizer.json gives token 63, the model's vocabulary has 63"):
        from_text("w63 " * 9, words, windows=1, length=4, vocab_size=63)


def test_lines_become_sequences(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(
        b'[1, 2, 3]\r\n\n  \n{"tokens": [63], "label": "the last"}\n{"label": "the last", "tokens": [0, 0]}\n[5]'
    )
    made = from_jsonl(path, 64, 3)
    assert [s.label for s in made] == ["line 1 (3 tokens)", "the last", "the last (line 5)", "line 6 (1 token)"]
    assert [s.tokens.tolist() for s in made] == [[1, 2, 3], [63], [0, 0], [5]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[1, 2", "is no valid JSON"),
        ("[NaN]", "is no valid JSON: NaN is no JSON number"),
        ("[" * 100_000, "nested too deeply"),
        ("7", "tokens are 7, must be a list"),
        ('"w1 w2"', "tokens are 'w1 w2', must be a list"),
        ("[]", "has no tokens"),
        ("[1, 2.0]", "token 1 is 2.0, must be an integer"),
        ("[true]", "token 0 is True, must be an integer"),
        ("[[1]]", r"token 0 is \[1\], must be an integer"),
        ("[3, -1]", "token 1 is -1, the vocabulary is 0..63"),
        ("[64]", "token 0 is 64, the vocabulary is 0..63"),
        (f"[{10**30}]", "token 0 is an integer of more than 20 digits, the vocabulary"),
        ("[1, 2, 3, 4, 5]", "has 5 tokens, the engine's context is 4"),
        ('{"tokens": [1], "tokens": [2]}', "key 'tokens' stands there twice"),
        ('{"ids": [1]}', "key 'ids' is not understood"),
        ('{"label": "a"}', "has no 'tokens'"),
        ('{"tokens": null}', "tokens are None, must be a list"),
        ('{"tokens": [1], "label": 3}', "label is 3, must be a short line of text"),
        ('{"tokens": [1], "label": "a\\u001b[31m"}', "must be a short line of text"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f"[1]\n\n{line}\n")
    with pytest.raises(EngineError, match=rf"prompts\.jsonl, line 3: .*{message}") as caught:
        from_jsonl(path, 64, 4)
    assert caught.value.hint and len(caught.value.message) < 400


def test_a_file_without_lines_or_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    with pytest.raises(EngineError, match=r"prompts\.jsonl: cannot be read: No such file"):
        from_jsonl(path, 64, 4)
    path.write_text(" \n\n")
    with pytest.raises(EngineError, match=r"prompts\.jsonl: has no lines"):
        from_jsonl(path, 64, 4)
    path.write_bytes(b"\xff\xfe[1]\n")
    with pytest.raises(EngineError, match="line 1: is no valid JSON"):
        from_jsonl(path, 64, 4)


def test_many_lines_are_quick(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(f"{list(range(i % 40, i % 40 + 20))}\n" for i in range(100_000)))
    before = time.process_time()
    assert len(from_jsonl(path, 64, 20)) == 100_000
    assert time.process_time() - before < 20  # some 2 s; quadratic would be minutes


@settings(max_examples=30)
@given(vocabulary=st.integers(1, 3000), count=st.integers(1, 600))
def test_candidates_are_spread_evenly(vocabulary: int, count: int) -> None:
    tokens = spread(vocabulary, count)
    assert len(set(tokens)) == len(tokens) == min(vocabulary, count)
    assert tokens == sorted(tokens) and tokens[0] >= 0 and tokens[-1] < vocabulary
    assert max(np.diff([-1, *tokens, vocabulary]), default=0) <= 2 * -(-vocabulary // len(tokens))


def test_tokens_that_change_their_minds_are_left_out() -> None:
    config = parsed(raw_config(vocab_size=64, num_local_experts=4, num_experts_per_tok=1))
    restless = frozenset(range(0, 64, 4)) - {8, 20, 36}  # expert 0's, but for three
    stack = FakeStack(config, restless)
    candidates = [*range(0, 64, 4), 1, 2]
    found = one_way(stack, 12, candidates)
    assert found is not None
    assert found.expert == 0 and found.share == 1 and found.layer == min(config.moe_layers) == 1
    assert len(set(found.tokens.tolist())) >= 2 and set(found.tokens.tolist()) <= {8, 20, 36}
    # Where all change their minds, the share says so.
    found = one_way(FakeStack(config, frozenset(range(64))), 12, candidates)
    assert found is not None and found.share == pytest.approx(1 / 12)
    assert found.note.startswith("all to one expert: 8% of 12 tokens")


def test_random_models_are_searched_in_few_runs(tmp_path: Path) -> None:
    raw = raw_config(num_experts_per_tok=1)
    stack = EagerStack(write_checkpoint(tmp_path / "checkpoint", raw))
    found = one_way(stack, 16)
    assert found is not None and len(found.tokens) == 16
    assert found.share == _share(stack, found)
    counted = FakeStack(parsed(raw), frozenset(range(64)))
    one_way(counted, 16)
    assert counted.layers_run <= 2 * 4  # two layers: the candidates alone, and three rounds


def _share(stack: Stack, found: OneWay) -> float:
    """The share, from the router's logits by another way (torch.topk)."""
    hidden = list(stack.embed([found.tokens]))
    for layer in range(found.layer):
        hidden = [values.hidden for values in stack.layer(layer, hidden)]
    (values,) = stack.layer(found.layer, hidden)
    assert values.router is not None
    chosen = torch.topk(torch.from_numpy(values.router), stack.config.num_experts_per_tok).indices
    return float((chosen == found.expert).any(dim=1).double().mean())


def test_the_miniature_can_be_sent_one_way() -> None:
    stack = EagerStack(miniature())
    sequences, notes = built_in(
        ["adversarial"], stack.config, longest=1024, pick_one_way=functools.partial(one_way, stack)
    )
    found = one_way(stack, 72)
    assert found is not None
    assert found.share > 0.9 and found.share == _share(stack, found)
    assert len(set(found.tokens.tolist())) >= 2
    assert sequences[-1].tokens.tolist() == found.tokens.tolist() and notes == [found.note]
    # Far above what a text does.
    text = Tokenizer.from_directory(miniature()).encode(held_out_text())[:72]
    usual = OneWay(np.array(text, np.int64), found.layer, found.expert, 0.0)
    assert _share(stack, usual) < 0.5
