"""Trains the miniature checkpoint: a Llama 4 text model of 3.5 million parameters with every feature on.

    python train_miniature.py OUT [--steps N] [--minutes M] [--seed N] [--packages FOLDER | --installed]

It learns from public-domain text (see ``miniature_text``) on two CPU cores in under an hour, and writes a checkpoint
in Hugging Face layout to OUT, together with held-out text and a record of how it was made. The model is the one of
transformers. While it trains, the mixture of experts and the attention are computed by faster functions, which are
compared with those of transformers before the first step; all that is measured at the end uses transformers alone.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from miniature_text import HELD_OUT_BOOKS, HELD_OUT_LETTERS, Corpus, from_installed, from_packages, sha256
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface, GenerationConfig, Llama4ForCausalLM, Llama4TextConfig
from transformers import PreTrainedTokenizerFast as FastTokenizer
from transformers.models.llama4.modeling_llama4 import Llama4Router, Llama4TextAttention, Llama4TextMoe

BEGIN, END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
WINDOW = 512
"""Tokens per scored window, the first of which is ``BEGIN``."""
STEP_TOKENS = 8 * WINDOW
WARMUP = 150
"""Steps."""

VOCABULARY, EXPERTS, CHUNK = 2048, 8, 64
BEGIN_ID, END_ID, PAD_ID = 0, 1, 2

CONFIG = Llama4TextConfig(
    vocab_size=VOCABULARY,
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    intermediate_size=128,
    intermediate_size_mlp=512,
    num_local_experts=EXPERTS,
    num_experts_per_tok=1,
    interleave_moe_layer_step=2,
    no_rope_layers=[1, 1, 1, 0, 1, 1, 1, 0],
    attention_chunk_size=CHUNK,
    attn_temperature_tuning=True,
    floor_scale=64,
    attn_scale=0.1,
    use_qk_norm=True,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
        "original_max_position_embeddings": 64,
    },
    max_position_embeddings=1024,
    tie_word_embeddings=False,
    attention_bias=False,
    initializer_range=0.05,
    bos_token_id=BEGIN_ID,
    eos_token_id=END_ID,
    pad_token_id=PAD_ID,
)
MOE_LAYERS: list[int] = CONFIG.moe_layers or []

Array = NDArray[np.int64]


def say(line: str) -> None:
    """Progress goes to stderr."""
    print(line, file=sys.stderr, flush=True)


def train_tokenizer(texts: list[str]) -> FastTokenizer:
    """A byte-level BPE: every text of Unicode has tokens and comes back unchanged."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BEGIN, END, PAD],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, bpe.token_to_id(BEGIN))]
    )
    return FastTokenizer(
        tokenizer_object=bpe,
        bos_token=BEGIN,
        eos_token=END,
        pad_token=PAD,
        model_max_length=CONFIG.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: FastTokenizer, texts: list[str], *, end: bool) -> Array:
    """Tokens of all texts in a row, each closed by ``END`` if asked for, without ``BEGIN``."""
    encodings = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    closing = [END_ID] if end else []
    return np.concatenate([np.array(encoding.ids + closing, dtype=np.int64) for encoding in encodings])


def routed_moe(self: Llama4TextMoe, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
    """``Llama4TextMoe.forward`` for one expert per token, which sends a token to its own expert only."""
    tokens = hidden_states.reshape(-1, self.hidden_dim)
    scores, logits = self.router(tokens)
    expert = logits.argmax(dim=1)
    order = expert.argsort()
    scaled = (tokens * scores.gather(1, expert[:, None]))[order]
    outputs = []
    for i, part in enumerate(scaled.split(expert.bincount(minlength=self.num_experts).tolist())):
        gate, up = (part @ self.experts.gate_up_proj[i]).chunk(2, dim=-1)
        outputs.append((up * self.experts.act_fn(gate)) @ self.experts.down_proj[i])
    routed = torch.cat(outputs)[order.argsort()]
    return self.shared_expert(tokens) + routed, logits


def blocked_attention(
    module: Llama4TextAttention, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention of whole, unpadded sequences; in chunked layers every chunk is a sequence of its own."""
    batch, heads, length, dim = query.shape
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    if not module.use_rope:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2), None
    query, key, value = (x.reshape(batch * heads * length // CHUNK, CHUNK, dim) for x in (query, key, value))
    mask = torch.full((CHUNK, CHUNK), -math.inf, dtype=query.dtype).triu(1).expand(len(query), CHUNK, CHUNK)
    weights = torch.baddbmm(mask, query, key.transpose(1, 2), alpha=module.scaling).softmax(dim=-1)
    return torch.bmm(weights, value).view(batch, heads, length, dim).transpose(1, 2), None


@contextmanager
def fast(model: Llama4ForCausalLM) -> Iterator[None]:
    """Computes the model with the two functions above."""
    AttentionInterface.register("blocked", blocked_attention)
    reference, implementation = Llama4TextMoe.forward, model.config._attn_implementation
    Llama4TextMoe.forward = routed_moe  # type: ignore[method-assign]
    model.set_attn_implementation("blocked")
    try:
        yield
    finally:
        Llama4TextMoe.forward = reference  # type: ignore[method-assign]
        model.set_attn_implementation(implementation)


def loss_of(model: Llama4ForCausalLM, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood in nats per token."""
    logits = model(inputs, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def check_fast(model: Llama4ForCausalLM) -> float:
    """Refuses a fast path whose loss or gradients differ from those of transformers; returns the largest difference."""
    tokens = torch.randint(3, VOCABULARY, (2, 257))[:, :-1]
    results: list[list[Tensor]] = []
    for is_fast in (False, True):
        model.zero_grad()
        with fast(model) if is_fast else nullcontext():
            loss = loss_of(model, tokens, tokens.roll(-1, dims=1))
            loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    model.zero_grad()
    worst = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in zip(*results, strict=True))
    if worst > 1e-3:
        raise RuntimeError(f"the fast path differs from transformers: {worst:.2g} of the largest gradient")
    return worst


def batches(tokens: Array, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless random windows that begin with ``BEGIN``: 8 of 512 tokens, every fourth time 4 of 1024."""
    rng = np.random.default_rng(seed)
    count = 0
    while True:
        length = 2 * WINDOW if count % 4 == 3 else WINDOW
        rows = STEP_TOKENS // length
        starts = rng.integers(0, len(tokens) - length, rows)
        targets = torch.from_numpy(tokens[starts[:, None] + np.arange(length)])
        yield torch.cat([torch.full((rows, 1), BEGIN_ID), targets[:, :-1]], dim=1), targets
        count += 1


@contextmanager
def router_logits(model: Llama4ForCausalLM) -> Iterator[list[Tensor]]:
    """A list that the routers append their logits ``[tokens, experts]`` to, layer by layer."""
    seen: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Llama4Router)]
    handles = [router.register_forward_hook(lambda _m, _args, out: seen.append(out[1])) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def balance_loss(logits: Tensor) -> Tensor:
    """The load-balance loss of the Switch Transformer: 1 where tokens spread evenly, up to the number of experts."""
    experts = logits.shape[1]
    share = F.one_hot(logits.argmax(dim=1), experts).float().mean(dim=0)
    return experts * (share * logits.float().softmax(dim=1).mean(dim=0)).sum()


def train(model: Llama4ForCausalLM, tokens: Array, args: argparse.Namespace) -> tuple[list[tuple[int, float]], int]:
    """Trains in place; returns the loss curve (the mean since the point before) and the number of tokens seen."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    every = max(1, args.steps // 300)
    curve: list[tuple[int, float]] = []
    recent: list[float] = []
    seen, start = 0, time.monotonic()
    model.train()
    with fast(model), router_logits(model) as routed:
        for step, (inputs, targets) in enumerate(batches(tokens, args.seed)):
            elapsed = time.monotonic() - start
            done = max(step / args.steps, elapsed / (60 * args.minutes) if args.minutes else 0.0)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min((step + 1) / WARMUP, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)
            routed.clear()
            with torch.autocast("cpu", torch.bfloat16):
                loss = loss_of(model, inputs, targets)
            balance = torch.stack([balance_loss(logits) for logits in routed]).mean()
            optimizer.zero_grad()
            (loss + args.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            seen += inputs.numel()
            recent.append(loss.item())
            if len(recent) == every:
                curve.append((step + 1, round(sum(recent) / every, 4)))
                recent = []
                if len(curve) % 10 == 0:
                    speed = seen / (time.monotonic() - start)
                    say(f"step {step + 1} loss {curve[-1][1]:.3f} balance {balance.item():.3f}, {speed:.0f} tokens/s")
    model.eval()
    return curve, seen


@torch.inference_mode()
def evaluate(model: Llama4ForCausalLM, tokens: Array) -> tuple[list[float], list[list[float]]]:
    """Negative log-likelihood in nats of each window of ``BEGIN`` and 511 tokens, and the load of experts by layer."""
    losses: list[float] = []
    loads: NDArray[np.float64] = np.zeros((len(MOE_LAYERS), EXPERTS))
    with router_logits(model) as routed:
        for start in range(0, len(tokens), WINDOW - 1):
            targets = torch.from_numpy(tokens[start : start + WINDOW - 1])[None]
            inputs = F.pad(targets, (1, 0), value=BEGIN_ID)
            routed.clear()
            logits = model(inputs, use_cache=False).logits[0, :-1]
            losses.append(float(F.cross_entropy(logits.double(), targets[0], reduction="sum")))
            loads += [layer.argmax(dim=1).bincount(minlength=EXPERTS).numpy() for layer in routed]
    shares: list[list[float]] = (loads / loads.sum(axis=1, keepdims=True)).round(4).tolist()
    return [round(loss, 3) for loss in losses], shares


def sample(model: Llama4ForCausalLM, tokenizer: FastTokenizer, prompt: str) -> str:
    """A continuation, for a look."""
    torch.manual_seed(0)
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    out = model.generate(**inputs, max_new_tokens=120, do_sample=True, temperature=0.7, top_k=0, top_p=0.9)
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def write_json(path: Path, record: dict[str, Any]) -> None:
    """One line for each key."""
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in record.items())
    path.write_text("{\n" + lines + "\n}\n", encoding="utf-8")


def replace(staged: Path, out: Path) -> None:
    """Puts a finished folder in the place of an older one, whose README it keeps."""
    if out.exists():
        if (out / "README.md").exists():
            shutil.copy2(out / "README.md", staged)
        old = out.with_name(out.name + ".old")
        out.rename(old)
        staged.rename(out)
        shutil.rmtree(old)
    else:
        staged.rename(out)


def make(corpus: Corpus, args: argparse.Namespace) -> None:
    """Trains, writes the checkpoint, measures what was written and records it."""
    out: Path = args.out.resolve()
    staged = out.with_name(out.name + ".new")
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)

    train_text, held_out_text = corpus.joined(held_out=False), corpus.joined(held_out=True)
    (staged / "held_out.txt").write_text(held_out_text, encoding="utf-8")
    tokenizer = train_tokenizer(corpus.part(held_out=False))
    tokenizer.save_pretrained(staged)
    tokens = encode(tokenizer, corpus.part(held_out=False), end=True)
    held_out = encode(tokenizer, [held_out_text], end=False)
    say(f"{len(train_text.encode())} bytes, {len(tokens)} tokens to train on; {len(held_out)} held out")

    model = Llama4ForCausalLM(CONFIG)
    say(f"{model.num_parameters()} parameters; fast path differs by {check_fast(model):.1g}")
    start = time.monotonic()
    curve, seen = train(model, tokens, args)
    minutes = (time.monotonic() - start) / 60

    model.generation_config = GenerationConfig(bos_token_id=BEGIN_ID, eos_token_id=END_ID, pad_token_id=PAD_ID)
    model.bfloat16().save_pretrained(staged, max_shard_size="4MB")
    for shard in staged.glob("*.safetensors"):
        shard.chmod(0o644)
    model = Llama4ForCausalLM.from_pretrained(staged, dtype=torch.float32).eval()
    losses, shares = evaluate(model, held_out)
    counts = np.bincount(tokens, minlength=VOCABULARY)
    write_json(staged / "unigram.json", {"tokens": len(tokens), "counts": counts.tolist()})
    unigram = math.exp(-np.log((counts[held_out] + 1) / (len(tokens) + VOCABULARY)).mean())
    perplexity = math.exp(sum(losses) / len(held_out))
    record = {
        "command": f"python train_miniature.py miniature --steps {args.steps} --seed {args.seed}"
        + (f" --minutes {args.minutes:g}" if args.minutes else ""),
        "seed": args.seed,
        "steps": seen // STEP_TOKENS,
        "tokens_seen": seen,
        "minutes": round(minutes, 1),
        "optimizer": {"name": "AdamW", "lr": args.lr, "warmup": WARMUP, "weight_decay": args.weight_decay},
        "balance": args.balance,
        "threads": args.threads,
        "versions": {"python": platform.python_version()}
        | {module.__name__: module.__version__ for module in (torch, transformers, tokenizers, np)},
        "packages": corpus.packages,
        "train_text": {"bytes": len(train_text.encode()), "sha256": sha256(train_text), "tokens": len(tokens)},
        "held_out_text": {
            "bytes": len(held_out_text.encode()),
            "sha256": sha256(held_out_text),
            "tokens": len(held_out),
            "letters_of_the_lexicon": HELD_OUT_LETTERS,
            "books_of_the_bible": HELD_OUT_BOOKS,
        },
        "window": WINDOW,
        "perplexity": round(perplexity, 4),
        "unigram_perplexity": round(unigram, 4),
        "expert_shares": dict(zip(map(str, MOE_LAYERS), shares, strict=True)),
        "window_nll": losses,
        "loss_curve": curve,
    }
    write_json(staged / "training.json", record)
    say(f"perplexity {perplexity:.2f}, of unigrams {unigram:.1f}; smallest share {min(map(min, shares)):.3f}")
    replace(staged, out)
    for prompt in ("And the king said unto", "hack: n."):
        say(f"\n--- {sample(model, tokenizer, prompt)}")


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="checkpoint folder; an older one is replaced when all is done")
    parser.add_argument("--steps", type=int, default=4500, help=f"of {STEP_TOKENS} tokens (default: %(default)s)")
    parser.add_argument("--minutes", type=float, help="train for so long at most, the learning rate falls in time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lr", type=float, default=3e-3, help="highest learning rate (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--balance", type=float, default=0.02, help="weight of the load-balance loss")
    parser.add_argument("--threads", type=int, default=2)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--packages", type=Path, help="folder with the .deb files (default: download them)")
    source.add_argument("--installed", action="store_true", help="take the text from the installed packages")
    args = parser.parse_args()
    make(from_installed() if args.installed else from_packages(args.packages), args)


if __name__ == "__main__":
    main()
