"""What a transformer is, as data: the vocabulary in which a family describes itself. Static and hashable, no arrays.

A family reads a Hugging Face config into a `Config`; `transformer.Model` builds what it says.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtune.models.rope import Rope


class Norm(NamedTuple):
    """kind: rms (arXiv:1910.07467) or layer (1607.06450). `plus_one`: the stored weight w means a scale of 1 + w."""

    kind: str = "rms"
    eps: float = 1e-6
    plus_one: bool = False
    bias: bool = True  # of a layer norm
    scale: bool = True


class Attention(NamedTuple):
    """Grouped-query attention.

    projection: split (three matmuls), joined ([q | k | v] in one), grouped (one matmul, for each key/value head its
    queries, its key, its value; multi-query and per-head layouts are its extreme cases).
    qk_norm: "" | head (over each head's dims) | all (over the whole projection). rope_dims: how many leading dims of a
    head rotate; 0 = none. interleaved: pairs are (2i, 2i + 1) instead of (i, i + H/2). gated: the query projection makes
    for each head its queries and a gate, whose sigmoid multiplies the head's output. reuse: the number of an earlier layer
    whose keys and values this one attends to, having none of its own.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    projection: str = "split"
    bias: bool = False
    out_bias: bool = False
    qk_norm: str = ""
    v_norm: bool = False
    shared_kv: bool = False  # values are the keys before their norm and rotation
    scale: float | None = None  # None: 1 / sqrt(head_dim)
    softcap: float | None = None
    sinks: bool = False
    rope_dims: int = 0
    interleaved: bool = False
    slopes: tuple[float, ...] = ()
    causal: bool = True
    gated: bool = False
    reuse: int | None = None


class Latent(NamedTuple):
    """Multi-head latent attention (arXiv:2405.04434): keys and values from one low-rank latent, a rotated part shared."""

    num_heads: int
    q_rank: int | None
    kv_rank: int
    nope_dim: int
    rope_dim: int
    value_dim: int
    bias: bool
    scale: float
    interleaved: bool

    @property
    def num_kv_heads(self) -> int:
        return self.num_heads


class Delta(NamedTuple):
    """Gated delta rule (arXiv:2412.06464): a linear recurrence over time with a matrix for a state."""

    num_key_heads: int
    num_value_heads: int
    key_dim: int
    value_dim: int
    kernel: int  # taps of the causal depthwise convolution
    act: str  # after the convolution

    @property
    def num_heads(self) -> int:
        return self.num_value_heads

    @property
    def num_kv_heads(self) -> int:
        return self.num_key_heads


class Mlp(NamedTuple):
    """gated: down(act(gate(x)) * up(x)), else down(act(up(x))). joined: gate and up in one matmul."""

    dim: int
    act: str
    gated: bool = True
    joined: bool = False
    bias: bool = False


class Experts(NamedTuple):
    """A dropless mixture of experts.

    scoring: softmax (over all experts) | sigmoid | top_softmax (over the chosen ones). normalised: chosen weights sum to 1.
    select_bias: a bias that moves the choice and not the weight. groups, top_groups: experts are chosen inside the best
    groups (arXiv:2412.19437). shared: an MLP that every token takes. clamp = (alpha, limit): the
    gate's swish has slope alpha, both halves are clamped at limit, up gains 1, and gate and up alternate in one weight.
    joined: gate and up are the halves of one weight (without bias). router_norm: the router reads x / rms(x) * a learnt vector / sqrt(D),
    with this eps. expert_scale: a learnt factor of each expert's output.
    """

    num_experts: int
    top_k: int
    dim: int
    scoring: str = "softmax"
    normalised: bool = True
    select_bias: bool = False
    groups: int = 1
    top_groups: int = 1
    weight_scale: float = 1.0
    router_bias: bool = False
    bias: bool = False
    act: str = "silu"
    clamp: tuple[float, float] | None = None  # (alpha, limit)
    shared: Mlp | None = None
    joined: bool = False
    router_norm: float | None = None
    expert_scale: bool = False


class Block(NamedTuple):
    """norms: pre | post (of a sublayer's output, before the residual) | sandwich (both) | after (of the sum) | parallel
    (both sublayers read the same x, each its own norm) | parallel_one (one norm for both). `first_norm` False: the norm
    before attention is left out.

    beside: experts that run next to a dense ffn, each of the two with norms of its own inside the sandwich.
    """

    attention: Attention | Latent | Delta
    ffn: Mlp | Experts
    norms: str = "pre"
    first_norm: bool = True
    residual_scale: bool = False  # a fixed scalar that multiplies the block's output
    beside: Experts | None = None
    layer_input: int = 0  # width of what each token brings for this very layer (`Config.layer_input_vocab`)

    @property
    def experts(self) -> Experts | None:
        """The mixture that tokens of this block are routed to, if there is one."""
        return self.beside or (self.ffn if isinstance(self.ffn, Experts) else None)


class Group(NamedTuple):
    """Blocks that repeat as a pattern: one scan over `repeats`, whose body runs each block once."""

    blocks: tuple[Block, ...]
    repeats: int


class Head(NamedTuple):
    """What stands on the last hidden state, where that is not the plain projection to the vocabulary.

    dense (with bias) → act → norm → out: each part is there where it has a Hugging Face name. `out_dim` scores come out
    (0 of a bare model; labels, or the vocabulary where `tied` to the embedding table, `out` then names its bias alone). pool says which token's
    scores count for a whole text: first | last | mean; "" = every token has its own.
    """

    out_dim: int
    out: str = ""
    bias: bool = True
    tied: bool = False
    dense: str = ""
    dense_bias: bool = True
    act: str = "tanh"
    norm: str = ""
    pool: str = ""

    @property
    def bare(self) -> bool:
        """Whether hidden states are all that the model gives: nothing on it scores anything."""
        return not (self.out or self.tied)

    @property
    def scores_labels(self) -> bool:
        return bool(self.out) and not self.tied


class Config(NamedTuple):
    """A whole model. `windows` and `rope_of` say for each layer its window (0 = none) and which of `ropes` turns it."""

    vocab_size: int
    dim: int
    groups: tuple[Group, ...]
    norm: Norm
    max_positions: int
    tied_head: bool
    ropes: tuple[Rope, ...] = ()
    windows: tuple[int, ...] = ()
    rope_of: tuple[int, ...] = ()
    embed_scale: float = 1.0
    embed_dim: int = 0  # 0: dim
    embed_norm: bool = False
    learned_positions: int = 0  # rows of the table
    position_offset: int = 0
    token_types: int = 0
    final_norm: bool = True
    task_types: int = 0  # rows of a second table of types, of which only the first is used
    head_bias: bool = False
    head_softcap: float | None = None
    head: Head | None = None  # None: the projection to the vocabulary that `tied_head` and the fields above describe
    layer_input_vocab: int = 0  # rows of the table of each token's inputs to the layers; 0: none
    value_head: bool = False  # a value of each hidden state, for a critic, beside the head

    @property
    def num_layers(self) -> int:
        return sum(len(group.blocks) * group.repeats for group in self.groups)

    @property
    def blocks(self) -> list[tuple[Block, tuple[int, ...]]]:
        """Each stack of layers: (what its layers are, their numbers in the model)."""
        found, first = [], 0
        for group in self.groups:
            period = len(group.blocks)
            for at, block in enumerate(group.blocks):
                found.append((block, tuple(range(first + at, first + period * group.repeats, period))))
            first += period * group.repeats
        return found

    @property
    def layer_input(self) -> int:
        """Width of a token's input to one layer."""
        return max(block.layer_input for block, _ in self.blocks)

    @property
    def num_heads(self) -> int:
        return min(block.attention.num_heads for block, _ in self.blocks)

    @property
    def num_kv_heads(self) -> int:
        return min(block.attention.num_kv_heads for block, _ in self.blocks)


def uniform(block: Block, num_layers: int) -> tuple[Group, ...]:
    """The groups of a model whose layers are all alike."""
    return (Group((block,), num_layers),)
