"""The model's parameters: checkpoint names and shapes, and which layers are alike. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

from shuntyard.exporter.config import Llama4Config

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerKind:
    """Layers of one kind share their code and their shapes; only weights differ."""

    rope: bool
    moe: bool

    @property
    def function_name(self) -> str:
        """Name of the ONNX function, unique in the world since TensorRT matches functions by name alone."""
        return f"Llama4{'Rope' if self.rope else 'Nope'}{'Moe' if self.moe else 'Dense'}Layer"


def kind_of(config: Llama4Config, layer: int) -> LayerKind:
    """The kind of a layer."""
    return LayerKind(rope=config.uses_rope(layer), moe=config.is_moe(layer))


def layer_weights(config: Llama4Config, kind: LayerKind) -> dict[str, Shape]:
    """Names below ``model.layers.N.`` and shapes of a layer's weights, in the order of its function's inputs."""
    hidden, head_dim = config.hidden_size, config.head_dim
    expert, dense, experts = config.intermediate_size, config.intermediate_size_mlp, config.num_local_experts
    weights: dict[str, Shape] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (config.num_attention_heads * head_dim, hidden),
        "self_attn.k_proj.weight": (config.num_key_value_heads * head_dim, hidden),
        "self_attn.v_proj.weight": (config.num_key_value_heads * head_dim, hidden),
        "self_attn.o_proj.weight": (hidden, config.num_attention_heads * head_dim),
        "post_attention_layernorm.weight": (hidden,),
    }
    if config.attention_bias:
        projections = [f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")]
        weights |= {f"{name}.bias": weights[f"{name}.weight"][:1] for name in projections}
    mlp, width = ("feed_forward.shared_expert", expert) if kind.moe else ("feed_forward", dense)
    weights |= {
        f"{mlp}.gate_proj.weight": (width, hidden),
        f"{mlp}.up_proj.weight": (width, hidden),
        f"{mlp}.down_proj.weight": (hidden, width),
    }
    if kind.moe:
        weights |= {
            "feed_forward.router.weight": (experts, hidden),
            "feed_forward.experts.gate_up_proj": (experts, hidden, 2 * expert),
            "feed_forward.experts.down_proj": (experts, expert, hidden),
        }
    return weights


def outer_weights(config: Llama4Config) -> dict[str, Shape]:
    """Names and shapes of the weights outside the layers."""
    weights: dict[str, Shape] = {
        "model.embed_tokens.weight": (config.vocab_size, config.hidden_size),
        "model.norm.weight": (config.hidden_size,),
    }
    if not config.tie_word_embeddings:
        weights["lm_head.weight"] = (config.vocab_size, config.hidden_size)
    return weights


def all_weights(config: Llama4Config) -> dict[str, Shape]:
    """Every parameter of the model: checkpoint name -> shape."""
    weights = outer_weights(config)
    for i in range(config.num_hidden_layers):
        own = layer_weights(config, kind_of(config, i))
        weights |= {f"model.layers.{i}.{name}": shape for name, shape in own.items()}
    return weights
