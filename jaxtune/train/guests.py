"""Other models in the step, which do not train: a teacher, and this model as it was when training started.

Their weights stand among the frozen ones, under "NAME/" and the path that they have in their own model; they lie on the same
mesh by the same rules, and neither checkpoints nor exports know of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxtune import registry, sharding
from jaxtune.config import ConfigDict, base
from jaxtune.data.tokenizer import Tokenizer
from jaxtune.models import FAMILIES, taps
from jaxtune.objectives.ops import Objective
from jaxtune.types import UserError
from jaxtune.validation_retention import SELVES as SELVES
from jaxtune.validation_retention import objectives
from jaxtune.weights import peft_read, source

Params = dict[str, Any]
NAMES = ("start", "teacher")
PROJECTIONS = "distill/projections"  # path of what is learned from the student's width to the teacher's


def wanted(config: ConfigDict) -> tuple[str, ...]:
    """Which of `NAMES` the run has: another model that teaches; this one, as training starts."""
    asked = {taught_by(config)} if "distill" in objectives(config) else set()
    return tuple(name for name in NAMES if name in asked)


def taught_by(config: ConfigDict) -> str:
    """Which frozen model of the step teaches: teacher | start | reference (this one, its adapter off); "" where none does."""
    distill = config.distill
    if distill.mode != "online":
        return ""
    return {"adapter_off": "reference", "start": "start"}.get(distill.teacher, "teacher")


def with_teacher(config: ConfigDict, objective: Objective) -> Objective:
    """The objective as it gets its teacher: from a model in the step, or from the batch."""
    if config.train.objective != "distill":
        return objective
    name = taught_by(config)
    fields: tuple[str, ...] = ("teacher_logps_BTJ", "teacher_ids_BTJ") if config.distill.mode == "precomputed" else ()
    fields += ("gold_BT",) if config.distill.on_policy else ()
    return objective._replace(frozen=(name,) if name else (), fields=(*objective.fields, *fields))


def none(config: ConfigDict) -> ConfigDict:
    """The config of the same model and state for verbs that do not train it: no guest is wanted, nor what penalties compare with."""
    alone = config.copy_and_resolve_references()
    alone.distill.mode, alone.retain.penalties = "sequence", ()
    return alone


def config_of(config: ConfigDict) -> ConfigDict:
    """The config by which a teacher is found, made and loaded."""
    own, distill = config.copy_and_resolve_references(), config.distill
    own.model.source, own.model.tokenizer, own.model.quantize = (
        distill.teacher,
        distill.teacher_tokenizer,
        distill.teacher_quantize,
    )
    own.model.head, own.model.labels, own.model.chat_template, own.model.keep_layers = "", (), "", ()
    own.tune.method, own.tune.adapter = "lora" if distill.teacher_adapter else "full", distill.teacher_adapter
    own.train.objective, own.train.beside, own.train.neftune_noise_alpha = "sft", (), 0.0
    own.optim, own.retain, own.tune.freeze, own.tune.train_layers = base().optim, base().retain, (), ()
    return own


def check_tokens(config: ConfigDict, tokenizer: Tokenizer) -> None:
    """Refuses a teacher that splits text into other tokens than the student: its distributions would be of other words.

    Raises:
      UserError: with what goes together.
    """
    own, name = config_of(config), config.distill.teacher
    if (
        "distill" not in objectives(config)
        or name in SELVES
        or name.startswith("preset:")
        or config.distill.mode == "sequence"
    ):
        return
    theirs = source.find_tokenizer(own, source.find(own))
    try:
        source.check_same_tokens(theirs, tokenizer, f"distill.teacher={name!r}")
    except UserError as error:
        raise UserError(
            f"{error}, or distill.mode='sequence', where the teacher writes texts and its words need not be the student's"
        ) from None


def invited(config: ConfigDict, program: Any, abstract: Callable[..., Any]) -> Any:
    """The program with its guests, as shapes, dtypes and shardings; `abstract` is `state.abstract`.

    Raises:
      UserError: a teacher that is not to be had, or no language model over as many words.
    """
    found = {name: teacher(config, program, abstract) if name == "teacher" else None for name in wanted(config)}
    if "distill" in objectives(config):
        _check_compared(config, program.model_config, (found.get("teacher") or program).model_config)
    frozen = dict(program.frozen)
    for name, guest in found.items():
        own = program.state.params if guest is None else guest.frozen
        frozen |= {f"{name}/{path}": like for path, like in own.items()}
    labels = program.labels | dict.fromkeys(frozen.keys() - program.frozen.keys(), "frozen")
    return program._replace(guests=found, frozen=frozen, labels=labels)


def _check_compared(config: ConfigDict, student: Any, teacher: Any) -> None:
    words, top_k = min(student.vocab_size, teacher.vocab_size), config.distill.top_k
    if top_k > words:
        raise UserError(f"distill.top_k={top_k} is more than the {words:,} words of the models; 0 = all of them")
    pairs = tuple(config.distill.layer_map)
    for at, (whose, c) in enumerate((("student", student), ("teacher", teacher))):
        wanted = [pair[at] for pair in pairs]
        if wanted and max(wanted) >= c.num_layers:
            raise UserError(
                f"distill.layer_map={pairs} names layer {max(wanted)} of the {whose}, which has {c.num_layers}, 0 to {c.num_layers - 1}"
            )
        blocks = {number: block for block, numbers in c.blocks for number in numbers}
        silent = [
            number for number in wanted if config.distill.attention_weight and not taps.maps(blocks[number].attention)
        ]
        if silent:
            raise UserError(
                f"distill.attention_weight={config.distill.attention_weight}: layer {silent[0]} of the {whose} has no attention that its "
                "queries and keys alone decide (a recurrence, ALiBi or sinks): pair other layers, or set it to 0.0 (hidden states match)"
            )


def projections(config: ConfigDict, student: Any, mesh: Any) -> Params:
    """What is learned to compare hidden states of models that are not equally wide, as shapes: {} where nothing is."""
    distill = config.distill
    matches = bool(distill.hidden_weight and distill.layer_map) and "distill" in objectives(config)
    if not matches or distill.teacher in SELVES:
        return {}
    described = source.find(config_of(config)).hf_config
    theirs = registry.load("model_type", str(described.get("model_type")), FAMILIES).from_hf(described)
    if theirs.dim == student.dim:
        return {}
    shape = (len(distill.layer_map), student.dim, theirs.dim)
    return {PROJECTIONS: jax.ShapeDtypeStruct(shape, jnp.dtype(config.tune.dtype), sharding=sharding.replicated(mesh))}


def initial_projections(program: Any, seed: int) -> Params:
    """Their first values: N(0, 1 / D), which keeps lengths about as they are."""
    like = program.state.params.get(PROJECTIONS)
    if like is None:
        return {}
    make = lambda: jax.random.normal(jax.random.key(seed), like.shape, like.dtype) * like.shape[1] ** -0.5  # noqa: E731
    return {PROJECTIONS: jax.jit(make, out_shardings=like.sharding)()}


def teacher(config: ConfigDict, program: Any, abstract: Callable[..., Any]) -> Any:
    """The program of `distill.teacher`, a model of its own, on the mesh of the student's `program`.

    Raises:
      UserError: it is not to be had, or no language model over as many words.
    """
    own, name = config_of(config), config.distill.teacher
    model = source.find(own)
    guest = abstract(own, model.hf_config, program.mesh, 1, _adapter(own, model)[0], trains=False)
    theirs, ours = guest.model_config.vocab_size, program.model_config.vocab_size
    padded = model.path is not None  # whose words `check_tokens` has compared: what differs is padding
    if guest.model_config.head is not None or (theirs != ours and not padded):
        raise UserError(
            f"distill.teacher={name!r} scores {theirs:,} words (architectures={model.hf_config.get('architectures')}), and the student "
            f"{ours:,}; expected a language model over the same, or distill.mode='sequence'"
        )
    return guest


def _adapter(own: ConfigDict, model: source.Model) -> tuple[Any, Any]:
    if model.adapter is None:
        return None, None
    family = registry.load("model_type", str(model.hf_config.get("model_type")), FAMILIES)
    return peft_read.load(model.adapter, family, family.from_hf(model.hf_config), own.tune.dtype)


def load(config: ConfigDict, program: Any, params: Params, load_model: Callable[..., Any], progress: Any) -> Params:
    """The guests' arrays; `params` are the trainable ones as training starts, `load_model` is `start.load`."""
    found: Params = {}
    for name, guest in program.guests.items():
        if guest is None:
            own = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))(params)
        else:
            own = loaded(config, guest, load_model, progress)
        found |= {f"{name}/{path}": value for path, value in own.items()}
    return found


def loaded(config: ConfigDict, guest: Any, load_model: Callable[..., Any], progress: Any) -> Params:
    """The arrays of a `teacher`'s program."""
    its = config_of(config)
    model = source.find(its)
    own: Params = load_model(its, model, guest, _adapter(its, model)[1], progress)[1]
    return own


def own_of(name: str, program: Any, params: Params) -> Params:
    """A guest's parameters by the paths of its own model, out of all that a step has."""
    own = {path.removeprefix(f"{name}/"): value for path, value in params.items() if path.startswith(f"{name}/")}
    shared = {path: value for path, value in params.items() if "/" not in path}
    return jax.lax.stop_gradient(own if program.guests[name] is not None else shared | own)
