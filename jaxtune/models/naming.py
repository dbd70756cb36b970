"""Weight names in both worlds: one table per family, read in both directions.

Hugging Face keeps a tensor per layer and linear weights as (out, in); jaxtune keeps one stacked array for all layers and
linear weights as (in, out).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from jaxtune.models.spec import Config, Delta, Head, Latent, Mlp


class Weight(NamedTuple):
    """One tensor, or one for each layer (and expert).

    `hf` may hold "{}", the layer's number, and "{e}", the expert's; `ours` is then a stacked path with dims (L, …) or
    (L, E, …). `layers` are the Hugging Face numbers of the stack's layers in order. `transpose` swaps the last two dims.
    `shape` is the tensor's shape on disk where it only differs by dims of size 1.
    """

    hf: str
    ours: str
    transpose: bool = False
    layers: tuple[int, ...] = ()
    experts: int = 0
    shape: tuple[int, ...] | None = None

    @property
    def stacked(self) -> bool:
        return "{}" in self.hf

    def on_disk(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The stored tensor's shape, given it without dims of size 1; 0 in `shape` stands for what is left."""
        if not self.shape:
            return tuple(shape)
        rest = math.prod(shape) // math.prod(n for n in self.shape if n)
        return tuple(n or rest for n in self.shape)


def linear(hf: str, ours: str, *, bias: bool = False, transpose: bool = True) -> list[Weight]:
    """A linear layer's entries: `hf`.weight (out, in) <-> `ours`.kernel (in, out), and its bias."""
    entries = [Weight(f"{hf}.weight", f"{ours}.kernel", transpose=transpose)]
    return [*entries, Weight(f"{hf}.bias", f"{ours}.bias")] if bias else entries


def hf_names(table: Iterable[Weight]) -> dict[str, tuple[Weight, tuple[int, ...]]]:
    """Returns every Hugging Face tensor name -> (its entry, its place in the stacked array: (), (l,) or (l, e))."""
    names: dict[str, tuple[Weight, tuple[int, ...]]] = {}
    for weight in table:
        if not weight.stacked:
            names[weight.hf] = (weight, ())
            continue
        for row, layer in enumerate(weight.layers):
            name = weight.hf.replace("{}", str(layer))
            if not weight.experts:
                names[name] = (weight, (row,))
            for expert in range(weight.experts):
                names[name.replace("{e}", str(expert))] = (weight, (row, expert))
    return names


class Names(NamedTuple):
    """The Hugging Face names of a transformer's parts; most decoders since 2023 use the defaults.

    Names of a layer's parts follow `layer`. "" is a part that no model of the family has. `transposed` is False where
    linear weights are stored (in, out), as GPT-2's are. Norms hold `weight` and, for layer norms, `bias`.
    """

    embed: str = "model.embed_tokens"
    positions: str = ""
    types: str = ""
    task_types: str = ""
    embed_norm: str = ""
    project_in: str = ""
    project_out: str = ""
    norm: str = "model.norm"
    head: str = "lm_head"
    layer: str = "model.layers.{}"
    qkv: str = ""
    q: str = "self_attn.q_proj"
    k: str = "self_attn.k_proj"
    v: str = "self_attn.v_proj"
    out: str = "self_attn.o_proj"
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    sinks: str = "self_attn.sinks"
    gate: str = "mlp.gate_proj"
    up: str = "mlp.up_proj"
    gate_up: str = "mlp.gate_up_proj"
    down: str = "mlp.down_proj"
    attn_norm: str = "input_layernorm"
    attn_post_norm: str = ""
    mlp_norm: str = "post_attention_layernorm"
    mlp_post_norm: str = ""
    router: str = "mlp.gate"
    select_bias: str = "mlp.gate.e_score_correction_bias"
    expert_gate: str = "mlp.experts.{e}.gate_proj"
    expert_up: str = "mlp.experts.{e}.up_proj"
    expert_down: str = "mlp.experts.{e}.down_proj"
    experts: str = ""  # where a layer's experts are one tensor each: gate_up_proj (E, in, 2F) and down_proj (E, F, out)
    shared: str = "mlp.shared_experts"
    residual_scale: str = "layer_scalar"
    router_scale: str = "router.scale"
    expert_scale: str = "router.per_expert_scale"
    mlp_own_norm: str = "post_feedforward_layernorm_1"
    beside_norm: str = "pre_feedforward_layernorm_2"
    beside_post_norm: str = "post_feedforward_layernorm_2"
    transposed: bool = True
    experts_transposed: bool = False  # one tensor of all experts, (E, out, in)


def table(c: Config, names: Names) -> list[Weight]:
    """The weights of a model that `c` describes, under a family's names."""
    n = names

    def norm(hf: str, ours: str) -> list[Weight]:
        if not hf:
            return []
        entries = [Weight(f"{hf}.weight", f"{ours}.scale")]
        return [*entries, Weight(f"{hf}.bias", f"{ours}.bias")] if c.norm.kind == "layer" and c.norm.bias else entries

    found = [Weight(f"{n.embed}.weight", "embed.table")]
    if c.learned_positions:
        found.append(Weight(f"{n.positions}.weight", "position_embed.table"))
    if c.token_types:
        found.append(Weight(f"{n.types}.weight", "type_embed.table"))
    if c.embed_norm:
        found += norm(n.embed_norm, "embed_norm")
    if c.embed_dim and c.embed_dim != c.dim:
        found += linear(n.project_in, "project_in") + linear(n.project_out, "project_out")
    if c.final_norm:
        found += norm(n.norm, "norm")
    if c.layer_input_vocab:
        found.append(Weight("model.embed_tokens_per_layer.weight", "layer_inputs.embed_tokens_per_layer.table"))
        found += linear("model.per_layer_model_projection", "layer_inputs.per_layer_model_projection")
        found += norm("model.per_layer_projection_norm", "layer_inputs.per_layer_projection_norm")
    if c.task_types:
        found.append(Weight(f"{n.task_types}.weight", "task_embed.table"))
    if c.head:
        found += _head(c.head, norm)
    elif not c.tied_head:
        found += linear(n.head, "lm_head", bias=c.head_bias)
    for number, (block, layers) in enumerate(c.blocks):
        ours = "layers" if len(c.blocks) == 1 else f"layers.{number}"
        parts = _mixer(block.attention, n) + _feed(block.ffn, n, "mlp")
        if block.beside:
            parts += _feed(block.beside, n, "beside")
            for part in ("mlp_own_norm", "beside_norm", "beside_post_norm"):
                parts += norm(getattr(n, part), part)
        if block.layer_input:
            for name in ("per_layer_input_gate", "per_layer_projection"):
                parts += linear(name, f"layer_input.{name}")
            parts += norm("post_per_layer_input_norm", "layer_input.post_per_layer_input_norm")
        before, after = block.norms not in ("post", "after"), block.norms in ("post", "after", "sandwich")
        for wanted, part in (
            (before and block.first_norm, "attn_norm"),
            (after, "attn_post_norm"),
            (after, "mlp_post_norm"),
        ):
            parts += norm(getattr(n, part), part) if wanted else []
        if before and block.norms != "parallel_one":
            parts += norm(n.mlp_norm, "mlp_norm")
        if block.residual_scale:
            parts.append(Weight(n.residual_scale, "residual_scale"))
        found += [w._replace(hf=f"{n.layer}.{w.hf}", ours=f"{ours}.{w.ours}", layers=layers) for w in parts]
    if c.head and c.head.bare:  # stored without the name that the base model has in one with a head
        prefix = n.embed.split(".")[0] + "."
        found = [w._replace(hf=w.hf.removeprefix(prefix)) for w in found]
    return found


def _head(h: Head, norm: Callable[[str, str], list[Weight]]) -> list[Weight]:
    found = linear(h.dense, "task_head.dense", bias=h.dense_bias) if h.dense else []
    found += norm(h.norm, "task_head.norm")
    if h.tied:
        return [*found, Weight(h.out, "task_head.bias")] if h.out else found
    return found + linear(h.out, "task_head.out", bias=h.bias) if h.out else found


def _mixer(a: Any, n: Names) -> list[Weight]:
    if isinstance(a, Latent):
        return _latent(a)
    if isinstance(a, Delta):
        return _delta(a)

    def part(hf: str, ours: str, bias: bool) -> list[Weight]:
        return linear(hf, f"attn.{ours}", bias=bias, transpose=n.transposed)

    if a.projection == "split":
        found = part(n.q, "q_proj", a.bias)
        found += [] if a.reuse is not None else part(n.k, "k_proj", a.bias)
        found += [] if a.shared_kv or a.reuse is not None else part(n.v, "v_proj", a.bias)
    else:
        found = part(n.qkv, "qkv_proj", a.bias)
    found += part(n.out, "o_proj", a.out_bias)
    if a.qk_norm:
        for hf, ours in ((n.q_norm, "q_norm"), (n.k_norm, "k_norm"))[: 2 if a.reuse is None else 1]:
            found.append(Weight(f"{hf}.weight", f"attn.{ours}.scale"))
    return [*found, Weight(n.sinks, "attn.sinks")] if a.sinks else found


def _latent(a: Latent) -> list[Weight]:
    names = ["q_proj"] if a.q_rank is None else ["q_a_proj", "q_b_proj"]
    found = []
    for name in [*names, "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]:
        bias = a.bias and name in ("q_a_proj", "kv_a_proj_with_mqa", "o_proj")
        found += linear(f"self_attn.{name}", f"attn.{name}", bias=bias)
    norms = ["kv_a_layernorm"] if a.q_rank is None else ["q_a_layernorm", "kv_a_layernorm"]
    return found + [Weight(f"self_attn.{name}.weight", f"attn.{name}.scale") for name in norms]


def _delta(a: Delta) -> list[Weight]:
    found = []
    for name in ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"):
        found += linear(f"linear_attn.{name}", f"attn.{name}")
    return [
        *found,
        Weight("linear_attn.conv1d.weight", "attn.conv", shape=(0, 1, a.kernel)),
        Weight("linear_attn.dt_bias", "attn.dt_bias"),
        Weight("linear_attn.A_log", "attn.a_log"),
        Weight("linear_attn.norm.weight", "attn.norm.scale"),
    ]


def _feed(f: Any, n: Names, ours: str) -> list[Weight]:
    if isinstance(f, Mlp):
        return _mlp(f, n, ours)
    found = linear(n.router, f"{ours}.router", bias=f.router_bias)
    if f.select_bias:
        flat = (1, f.num_experts) if "moe_statics" in n.select_bias else None
        found.append(Weight(n.select_bias, f"{ours}.select_bias", shape=flat))
    if f.router_norm:
        found.append(Weight(n.router_scale, f"{ours}.router_scale"))
    if f.expert_scale:
        found.append(Weight(n.expert_scale, f"{ours}.expert_scale"))
    if n.experts:
        for name in ("gate_up_proj", "down_proj"):
            found.append(Weight(f"{n.experts}.{name}", f"{ours}.experts.{name}.kernel", transpose=n.experts_transposed))
            if f.bias:
                found.append(Weight(f"{n.experts}.{name}_bias", f"{ours}.experts.{name}.bias"))
    else:
        for hf, name in ((n.expert_gate, "gate_proj"), (n.expert_up, "up_proj"), (n.expert_down, "down_proj")):
            found += [w._replace(experts=f.num_experts) for w in linear(hf, f"{ours}.experts.{name}", bias=f.bias)]
    if f.shared:
        inner = n._replace(gate=f"{n.shared}.gate_proj", up=f"{n.shared}.up_proj", down=f"{n.shared}.down_proj")
        found += _mlp(f.shared, inner, f"{ours}.shared")
    return found


def _mlp(m: Mlp, n: Names, ours: str) -> list[Weight]:
    into = [("gate_up", n.gate_up)] if m.gated and m.joined else [("up", n.up)]
    into = [("gate", n.gate), *into] if m.gated and not m.joined else into
    found = []
    for part, hf in [*into, ("down", n.down)]:
        found += linear(hf, f"{ours}.{part}_proj", bias=m.bias, transpose=n.transposed)
    return found
