"""An opened engine: what a caller gets, held to transformers and to itself."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file

from shuntyard.engines import Engine, open_engine
from shuntyard.engines.build import Request, build
from shuntyard.errors import CheckpointError, EngineError, NotFiniteError
from shuntyard.exporter.export import export
from tests.checkpoints import parsed, random_weights, raw_config, write_checkpoint
from tests.parity.reference import Reference, largest_difference
from tests.tolerances import MODEL_MAX_ABS, ROUTER_MARGIN

RAW = raw_config(num_hidden_layers=8)
CHUNK, VOCABULARY, CONTEXT = RAW["attention_chunk_size"], RAW["vocab_size"], 40
Ints = NDArray[np.int64]


@pytest.fixture(scope="module")
def engine(engine_directory: Path) -> Engine:
    return open_engine(engine_directory, verify=True)


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Reference:
    weights = {k: v for shard in checkpoint.glob("*.safetensors") for k, v in load_file(shard).items()}
    return Reference(RAW, weights)


def tokens_of(seed: int, batch: int, length: int) -> Ints:
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=(batch, length))


@settings(max_examples=25)
@given(st.integers(0, 99), st.lists(st.integers(1, 3 * CHUNK), min_size=1, max_size=4), st.integers(0, 3 * CHUNK))
def test_ragged_batches_are_transformers(
    engine: Engine, reference: Reference, seed: int, lengths: list[int], decode_from: int
) -> None:
    tokens = tokens_of(seed, len(lengths), max(lengths))
    expected = reference.logits(tokens, lengths)
    if reference.margin <= ROUTER_MARGIN:
        return  # no single right answer
    got = engine.logits(tokens, lengths, decode_from=decode_from)
    assert got.dtype == np.float32
    assert largest_difference(got, expected) <= MODEL_MAX_ABS


@settings(max_examples=25)
@given(st.integers(0, 99), st.lists(st.integers(1, 20), min_size=2, max_size=4), st.integers(1, 20))
def test_a_ragged_batch_is_each_sequence_run_alone(engine: Engine, seed: int, lengths: list[int], count: int) -> None:
    tokens = tokens_of(seed, len(lengths), max(lengths))
    together, logits = engine.generate(tokens, count, lengths, stop=[]), engine.logits(tokens, lengths)
    assert together.dtype == np.int64
    assert together.shape == (len(lengths), count)
    for row, n in enumerate(lengths):
        alone = tokens[row : row + 1, :n]
        np.testing.assert_array_equal(together[row : row + 1], engine.generate(alone, count, stop=[]))
        assert np.abs(logits[row, :n] - engine.logits(alone)[0]).max() <= MODEL_MAX_ABS
        assert np.isnan(logits[row, n:]).all()


def test_what_stands_behind_a_sequences_end_does_not_matter(engine: Engine) -> None:
    tokens, lengths = tokens_of(3, 3, 20), [20, 7, 1]
    other = tokens.copy()
    other[1, 7:], other[2, 1:] = 0, -5  # not even tokens
    np.testing.assert_array_equal(engine.logits(tokens, lengths), engine.logits(other, lengths))


def test_generation_is_greedy_and_crosses_chunks(engine: Engine) -> None:
    tokens, lengths, count = tokens_of(5, 2, 6), [6, 3], 3 * CHUNK
    new = engine.generate(tokens, count, lengths, stop=[])
    for row, n in enumerate(lengths):
        whole = np.concatenate([tokens[row, :n], new[row]])
        logits = engine.logits(whole[None])[0]
        np.testing.assert_array_equal(logits[n - 1 : -1].argmax(axis=-1), new[row])


def test_stop_tokens_end_a_sequence_alone(engine: Engine) -> None:
    tokens = tokens_of(6, 3, 5)
    free = engine.generate(tokens, 12, stop=[])
    stop = int(free[0, 2])
    stopped = engine.generate(tokens, 12, stop=[stop])
    for row in range(3):
        ends = np.flatnonzero(free[row] == stop)
        kept = int(ends[0]) + 1 if len(ends) else 12
        np.testing.assert_array_equal(stopped[row, :kept], free[row, :kept])
        assert (stopped[row, kept:] == -1).all()


def test_the_checkpoints_end_of_sequence_is_the_default(model_directory: Path, tmp_path: Path) -> None:
    build(model_directory, tmp_path / "engine", Request(max_context=CONTEXT))
    manifest = tmp_path / "engine" / "shuntyard.json"
    free = open_engine(tmp_path / "engine").generate([[1, 2]], 6)[0]
    assert (free >= 0).all()  # this checkpoint has none
    manifest.write_text(manifest.read_text().replace('"eos_token_ids": []', f'"eos_token_ids": [{int(free[1])}]'))
    stopped = open_engine(tmp_path / "engine").generate([[1, 2]], 6)[0]
    assert len(stopped) == 2 or (stopped[2:] == -1).all()


def test_stream_yields_as_it_goes(engine: Engine) -> None:
    steps = engine.stream([[1, 2, 3]], 5, stop=[])
    first = next(steps)
    assert first.shape == (1,)
    np.testing.assert_array_equal([first[0], *(step[0] for step in steps)], engine.generate([[1, 2, 3]], 5, stop=[])[0])


def test_calls_do_not_remember_each_other(engine: Engine) -> None:
    tokens = tokens_of(7, 2, 20)
    before = engine.logits(tokens)
    engine.generate(tokens_of(8, 4, 24), 10, stop=[])
    np.testing.assert_array_equal(engine.logits(tokens), before)


def test_another_call_in_the_middle_of_a_stream_is_noticed(engine: Engine) -> None:
    first = engine.stream([[1, 2, 3]], 5, stop=[])
    next(first)
    engine.logits([[4, 5]])
    with pytest.raises(EngineError, match="another call has taken this engine's KV cache"):
        next(first)
    pair = engine.stream([[1, 2, 3]], 5, stop=[]), engine.stream([[4, 5, 6]], 5, stop=[])
    next(pair[0])
    next(pair[1])
    with pytest.raises(EngineError, match="another call"):
        next(pair[0])


def test_a_stream_checks_its_arguments_before_it_is_read(engine: Engine) -> None:
    with pytest.raises(EngineError, match="token 999"):
        engine.stream([[999]], 3)
    with pytest.raises(EngineError, match="exceed the engine's context"):
        engine.stream([[1]], 99)


def test_writing_into_an_open_engine_is_noticed(model_directory: Path, tmp_path: Path) -> None:
    build(model_directory, tmp_path / "engine", Request(max_context=CONTEXT, copy=True))
    opened = open_engine(tmp_path / "engine")
    opened.logits([[1, 2]])
    shard = next((tmp_path / "engine").glob("*.safetensors"))
    with shard.open("rb+") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    with pytest.raises(EngineError, match="has changed since the engine was opened"):
        opened.logits([[1, 2]])


def test_logits_that_overflow_give_no_tokens(tmp_path: Path) -> None:
    """Weights fit fp16, activations do not."""
    weights = random_weights(parsed(RAW))
    weights["model.layers.0.feed_forward.down_proj.weight"] *= 50000
    export(write_checkpoint(tmp_path / "hot", RAW, weights), tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", Request(dtype="fp16", max_context=CONTEXT))
    hot = open_engine(tmp_path / "engine")
    for call in (lambda: hot.logits([[1, 2, 3]]), lambda: hot.generate([[1, 2, 3]], 8, stop=[])):
        with pytest.raises(NotFiniteError, match="logits that are not finite"):
            call()


def test_no_new_tokens(engine: Engine) -> None:
    assert engine.generate([[1, 2], [3, 4]], 0).shape == (2, 0)


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "flat": ({"tokens": [1, 2]}, "tokens must be integers [batch, sequence]"),
    "floats": ({"tokens": [[1.0, 2.0]]}, "got float64 [1, 2]"),
    "empty": ({"tokens": np.zeros((1, 0), np.int64)}, "not empty"),
    "outside": ({"tokens": [[1, 64]]}, "token 64 at [0, 1] is not in the vocabulary of 64"),
    "negative": ({"tokens": [[-1, 2]]}, "token -1 at [0, 0] is not in the vocabulary of 64"),
    "too many sequences": ({"tokens": [[1]] * 9}, "a batch of 9 is larger than the engine's 8"),
    "too long": ({"tokens": [[1] * 41]}, "41 tokens and 0 after them exceed the engine's context of 40"),
    "lengths of another batch": ({"tokens": [[1, 2]], "lengths": [1, 2]}, "must be 1 numbers in 1..2"),
    "lengths that are none": ({"tokens": [[1, 2]], "lengths": 2}, "lengths are 2, must be a list"),
    "length of no integer": ({"tokens": [[1, 2]], "lengths": [1.9]}, "a length is 1.9, must be an integer"),
    "decoding from no integer": ({"tokens": [[1, 2]], "decode_from": 0.5}, "decode_from is 0.5, must be an integer"),
    "ragged lists": ({"tokens": [[1, 2], [3]]}, "tokens must be integers [batch, sequence]"),
    "length zero": ({"tokens": [[1, 2]], "lengths": [0]}, "must be 1 numbers in 1..2"),
    "length beyond": ({"tokens": [[1, 2]], "lengths": [3]}, "must be 1 numbers in 1..2"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls_are_refused(engine: Engine, name: str) -> None:
    arguments, message = WRONG[name]
    with pytest.raises(EngineError) as refused:
        engine.logits(**arguments)
    assert message in refused.value.message


def test_generation_beyond_the_context_is_refused(engine: Engine) -> None:
    assert engine.generate([[1] * 30], 11, stop=[]).shape == (1, 11)  # the last new token needs no place
    with pytest.raises(EngineError, match="30 tokens and 11 after them exceed the engine's context of 40"):
        engine.generate([[1] * 30], 12)
    with pytest.raises(EngineError, match="must not be negative"):
        engine.generate([[1]], -1)


def test_the_whole_context_can_be_used(engine: Engine, reference: Reference) -> None:
    tokens = tokens_of(1, 1, CONTEXT)
    expected = reference.logits(tokens)
    assert reference.margin > ROUTER_MARGIN
    assert largest_difference(engine.logits(tokens), expected) <= MODEL_MAX_ABS


def test_fp16_engine_is_close(model_directory: Path, tmp_path: Path, engine: Engine) -> None:
    build(model_directory, tmp_path / "half", Request(dtype="fp16", max_context=CONTEXT))
    tokens = tokens_of(2, 2, 20)
    wide, narrow = engine.logits(tokens), open_engine(tmp_path / "half").logits(tokens)
    assert 0 < np.abs(narrow - wide).mean() < 0.02 * np.abs(wide).mean()
    assert (narrow.argmax(-1) == wide.argmax(-1)).mean() > 0.9


def test_a_damaged_engine_is_refused(model_directory: Path, tmp_path: Path) -> None:
    target = tmp_path / "engine"
    build(model_directory, target, Request(max_context=CONTEXT, copy=True))
    shard = next(target.glob("*.safetensors"))
    data, status = bytearray(shard.read_bytes()), shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    open_engine(target)  # touched, but the same
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(EngineError, match="has changed since the engine was built"):
        open_engine(target)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    open_engine(target)  # somebody hides it: opening does not read all weights again, unless asked to
    with pytest.raises(EngineError, match="has changed since the engine was built"):
        open_engine(target, verify=True)
    shard.write_bytes(data[:-1])
    with pytest.raises(EngineError, match="bytes, the engine was built with"):
        open_engine(target)
    shard.unlink()
    with pytest.raises(EngineError, match="is missing from the engine"):
        open_engine(target)


def test_writing_into_the_checkpoint_writes_into_the_engine_and_is_noticed(tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "checkpoint", RAW)
    export(checkpoint, tmp_path / "model")
    build(tmp_path / "model", tmp_path / "engine", Request(max_context=CONTEXT))
    with (checkpoint / "model.safetensors").open("rb+") as stream:
        stream.seek(-4, os.SEEK_END)
        stream.write(b"\0\0\0\0")
    with pytest.raises(EngineError, match="has changed since the engine was built") as refused:
        open_engine(tmp_path / "engine")
    assert "somebody wrote into the checkpoint" in refused.value.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"eos_token_id": "two"}', "eos_token_id is 'two', must be a token id or a list of them"),
        ('{"eos_token_id": [1, null]}', "must be a token id"),
        ("{", "is no valid JSON"),
    ],
)
def test_a_generation_config_that_makes_no_sense(
    model_directory: Path, tmp_path: Path, text: str, message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_directory, model)
    (model / "generation_config.json").write_text(text)
    with pytest.raises(CheckpointError) as refused:
        build(model, tmp_path / "engine", Request(max_context=CONTEXT))
    assert "generation_config.json" in refused.value.message
    assert message in refused.value.message


def test_what_is_no_engine_is_refused(model_directory: Path, checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="is a model directory, not an engine"):
        open_engine(model_directory)
    with pytest.raises(CheckpointError, match=r"has no shuntyard\.json"):
        open_engine(checkpoint)
    with pytest.raises(CheckpointError, match=r"has no shuntyard\.json"):
        open_engine(tmp_path / "nowhere")
