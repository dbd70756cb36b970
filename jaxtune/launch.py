"""Entry: `python -m jaxtune.launch [VERB] --config=FILE [--config.a.b=v] [--workdir=DIR]`.

Reads the verb and the config, starts the distributed runtime where there is one, and hands over to `run.py`. A user's
mistake ends in one line on stderr and exit code 2; code 75 says "saved, run me again to resume".
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from jaxtune import config as config_lib
from jaxtune import fetch, hosts, validation, workdir
from jaxtune.types import RESUME_EXIT_CODE, UserError, Waiting, nearest

VERBS = {
    "train": "fine-tune, measure before and after, export, report (the default)",
    "evaluate": "measure a model, or a run's result, on held-out rows",
    "generate": "answer a file of prompts",
    "chat": "talk to the model in the terminal",
    "export": "write a run's result as a PEFT adapter or a Hugging Face model folder",
    "self_train": "rounds of sampling, judging and training on what was right (STaR, RFT, ReST-EM), or on gold answers in its own words",
    "plan": "compile the training step for a TPU that is not here, and say what it needs, takes and costs",
    "lr_find": "train a copy at ever higher learning rates, and say which one falls fastest",
    "sweep": "train once for each combination of config.sweep.axes, and compare",
    "merge": "put adapters or tuned models together, or a share of one with the base; no training",
    "frontier": "train by each of config.frontier.methods at each strength, and draw gain against what it cost",
    "update": "make the next release of config.lineage.folder from new data, or refuse it where it is worse than the last",
    "review": "serve the page on which experts label, compare, correct and flag; invite them; import and export what they said",
    "guide": "a round of guidance: rows or outputs to experts, their verdicts to data, training, evaluation, report",
    "judge": "compare the outputs of two models side by side, by experts or a model judge, until one is better or neither is",
    "audit": "probe a model for bias (groups swapped, BBQ, CrowS-Pairs), before and after",
}
_FILES = {verb: f"jaxtune.{verb}" for verb in ("lr_find", "sweep", "merge", "frontier", "update", "guide")} | {
    "review": "jaxtune.experts",
    "judge": "jaxtune.judging",
    "audit": "jaxtune.bias_audit",
}  # verbs that run.py does not hold
USAGE = (
    "usage: python -m jaxtune.launch [VERB] --config=configs/X.py [--config.a.b=value] [--workdir=DIR] [--dry_run]\n"
    + "\n".join(f"  {verb:<10} {what}" for verb, what in VERBS.items())
    + "\n  plan --search finds the best mesh, micro-batch and remat; plan --topologies[=v5e:4x4,v5p:2x2x2] ranks slices by price"
    + "\n  --dry_run prints the first batch token by token, what trains, and the schedule; then stops"
    + "\n  several hosts: --coordinator=HOST:PORT --num_processes=N --process_id=I (found by themselves on Cloud TPU)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "-help") for a in arguments) or not arguments:
        print(USAGE)
        return 0
    _forgive_terminals()
    try:
        code = _run(arguments)
    except BaseException as error:
        if hosts.joined():
            hosts.await_loss(error)
            traceback.print_exc()
            hosts.leave(1)
        raise
    hosts.leave(code)
    return code


def _run(arguments: list[str]) -> int:
    """The verb's exit code, and one line for what went wrong."""
    try:
        code = _dispatch(arguments)
        sys.stdout.flush()
        return code
    except UserError as error:
        return _refuse(str(error))
    except Waiting as waiting:
        print(waiting, file=sys.stderr)
        return RESUME_EXIT_CODE
    except BrokenPipeError:  # who reads the output, `head` say, has seen enough
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # nor does Python's own flush at the end complain
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from jaxtune.train.loop import Preempted

        if isinstance(error, Preempted):
            print(f"{error}; run the same command with --config.checkpoint.resume=True to go on", file=sys.stderr)
            return RESUME_EXIT_CODE
        from jaxtune.checkpoint import is_full

        if "RESOURCE_EXHAUSTED" in str(error) and not is_full(error):
            first = str(error).splitlines()[0]
            return _refuse(
                f"out of device memory ({first}): lower train.batch_size or data.max_length, set train.remat='block', or use more devices"
            )
        if is_full(error):
            return _refuse(f"disk full: {error}; free space and run again")
        if isinstance(error, OSError) and error.filename is not None:
            return _refuse(f"{error}; expected a path that can be read, or written to where it is a result")
        raise


def _refuse(message: str) -> int:
    print("error: " + " ".join(message.split("\n")), file=sys.stderr)
    return 2


def _forgive_terminals() -> None:
    """A terminal that lacks a character, or sends bytes that are none, shows or means another; it ends no run."""
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def _dispatch(arguments: list[str]) -> int:
    from jaxtune.tracking import quiet_libraries

    quiet_libraries()
    verb, options, values = _parse(arguments)
    _without_accelerator()
    validation.validate(options)
    if verb not in ("sweep", "frontier", "update", "review"):  # which start runs, each a process of its own, or none
        hosts.join(values.coordinator, values.num_processes, values.process_id, options.mesh.heartbeat_seconds)
    from jaxtune import run
    from jaxtune.train import compiled, goodput

    options.workdir = values.workdir or options.workdir or str(Path("runs") / options.name)
    for section, key in ((options, "workdir"), (options.export, "output"), (options.generate, "output")):
        section[key] = os.path.expanduser(section[key])  # shells leave the ~ of --workdir=~/runs alone
    _check_outputs(options, verb)
    if values.dry_run and verb != "train":
        raise UserError(f"--dry_run goes with train, not with {verb}")
    room = importlib.import_module(_FILES[verb]) if verb in _FILES else run
    action = run.dry_run if values.dry_run else getattr(room, verb)
    if action is run.train:
        action = partial(run.train, began=goodput.process_began())
    elsewhere = verb in (
        "plan",
        "sweep",
        "frontier",
        "review",
    )  # compiled for devices not here, in other processes, or not at all
    keeping = nullcontext() if elsewhere else compiled.kept(options)
    resuming = verb in ("sweep", "frontier") or (verb in ("train", "self_train") and options.checkpoint.resume)
    with keeping, workdir.Folder(options.workdir, resume=resuming) as folder:
        action(options, folder.path)
    return 0


def _check_outputs(options: config_lib.ConfigDict, verb: str) -> None:
    """Refuses a place for results that is taken, before any work is done."""
    workdir.check("workdir", options.workdir)
    for name, path in {"export.output": options.export.output, "generate.output": options.generate.output}.items():
        if "://" in path:
            raise UserError(
                f"{name}={path!r}; expected a path of this machine: only the workdir can be in Cloud Storage"
            )
    for name, path in {"workdir": options.workdir, "export.output": options.export.output}.items():
        taken = [p for p in (Path(path), *Path(path).parents) if path and "://" not in path and p.is_file()]
        if taken:
            raise UserError(
                f"{name}={path!r}: {taken[0]} is a file; expected a folder, or a path where there is nothing"
            )
    output, given = options.generate.output, options.generate.input
    if Path(output or "none").is_dir():
        raise UserError(f"generate.output={output!r} is a folder; expected the path of a file")
    place = Path(output or Path(options.workdir) / "generations.jsonl")
    if verb == "generate" and given and place.resolve() == Path(given).expanduser().resolve():
        raise UserError(f"generate.input={given!r} is where the answers go, and would be replaced; set generate.output")
    if verb in ("train", "export", "self_train"):
        _check_result(options, verb)


def _check_result(options: config_lib.ConfigDict, verb: str) -> None:
    """A result replaces the folder at its place, and a run writes into its workdir: neither may be the base itself."""
    local = [Path(uri).expanduser() for uri in (options.model.source, options.tune.adapter) if uri]
    sources = [path for path in local if path.exists()]
    folder = None if "://" in options.workdir else Path(options.workdir)
    if verb != "export" and folder and any(folder.resolve() == path.resolve() for path in sources):
        raise UserError(f"workdir={options.workdir!r} is what the run starts from; choose another --workdir")
    kind = "adapter" if options.tune.method in ("lora", "prompt") and not options.export.merge else "model"
    place = Path(options.export.output) if options.export.output else folder and folder / kind
    if place:
        workdir.check_result(place, folder, sources)


def _parse(arguments: list[str]) -> tuple[str, config_lib.ConfigDict, flags.FlagValues]:
    """Splits the command line into verb, config and other flags; a misspelt one is answered with the nearest."""
    arguments = _joined(arguments)
    words = [a for a in arguments if not a.startswith("-")]
    verb = words[0] if words else "train"
    if verb not in VERBS or len(words) > 1:
        wrong = words[1] if len(words) > 1 else verb
        meant = f"; a config is named by --config={wrong}" if wrong.endswith((".py", ".json")) else ""
        raise UserError(f"unknown verb {wrong!r}{meant or nearest(wrong, list(VERBS))}; verbs: {', '.join(VERBS)}")
    rest = [_short(a, verb) for a in arguments if a is not verb]
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
    flags.DEFINE_bool(
        "dry_run", False, "show the first batch, what trains and the schedule; then stop", flag_values=values
    )
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "processes in all", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "this process's number", flag_values=values)
    known = ["config", *values, *_SHORT]
    for argument in rest:
        name = re.match(r"--?(?:no)?([^=.]*)", argument).group(1)  # type: ignore[union-attr]
        if name not in known and f"no{name}" not in known:
            raise UserError(
                f"unknown flag {argument.split('=')[0]!r}{nearest(name, known)}; flags: {', '.join('--' + k for k in known)}"
            )
    base = _config_file(rest)
    overrides = _checked_overrides(rest, base)
    config_flags.DEFINE_config_dict(
        "config", base, lock_config=True, flag_values=values, sys_argv=["jaxtune", *overrides]
    )
    try:
        values(["jaxtune", *overrides])
    except (flags.Error, ValueError, TypeError, AttributeError) as error:
        raise UserError(_flag_message(str(error), base)) from None
    return verb, values.config, values


_SHORT = {
    "search": ("plan.search", "True"),
    "topologies": ("plan.topologies", "all"),
}  # flags of `plan`: field, value alone


def _short(argument: str, verb: str) -> str:
    """`--search` as `--config.plan.search=True`, and the like."""
    name, has_value, value = argument.lstrip("-").partition("=")
    if not argument.startswith("-") or name not in _SHORT:
        return argument
    if verb != "plan":
        raise UserError(f"--{name} goes with plan, not with {verb}")
    key, alone = _SHORT[name]
    return f"--config.{key}={value if has_value else alone}"


def _joined(arguments: list[str]) -> list[str]:
    """`--flag value` as `--flag=value`; a verb after a flag stays a verb, unless there was one before it."""
    joined: list[str] = []
    for argument in arguments:
        bare = joined and re.fullmatch(
            r"--?(config(\.[\w.]+)?|topologies|workdir|coordinator|num_processes|process_id)", joined[-1]
        )
        if bare and not argument.startswith("--") and (argument not in VERBS or VERBS.keys() & set(joined)):
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _config_file(arguments: list[str]) -> config_lib.ConfigDict:
    named = [a.split("=", 1)[1] for a in arguments if a.startswith(("--config=", "-config="))]
    if not named:
        raise UserError("no config: give --config=configs/quickstart.py, or a file of your own with get_config()")
    path = fetch.local(named[-1]) if "://" in named[-1] else Path(os.path.expanduser(named[-1]))
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UserError(f"config file {path} {'is a folder' if path.is_dir() else f'does not exist{near}'}")
    if path.suffix not in (".py", ".json"):
        raise UserError(
            f"config file {path} is of an unknown kind; expected .py with get_config(), or a run's config.json"
        )
    if path.suffix == ".json":
        try:
            return config_lib.from_json(path.read_text(encoding="utf-8-sig"))
        except (UserError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {error}") from None
    spec = importlib.util.spec_from_file_location("jaxtune_user_config", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a user's own code raises
        raise UserError(f"{path}{_line_of(error, path)}: {_what_went_wrong(error)}") from None
    if not isinstance(config, config_lib.ConfigDict):
        raise UserError(
            f"{path}: get_config() returned {type(config).__name__}; expected the ConfigDict of jaxtune.config.base()"
        )
    return config


def _line_of(error: BaseException, path: Path) -> str:
    """ ":17", the last line of the config file that the error passed through; "" where there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    line = error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None
    return f":{line}" if line else ""


def _what_went_wrong(error: BaseException) -> str:
    inner: Any = error
    while isinstance(inner, BaseException) and inner.args:  # a KeyError's own text would be quoted twice
        inner = inner.args[0]
    message = str(inner)
    unknown = re.match(r'Key "(\w+)" does not exist', message)  # ml_collections goes on to print the whole section
    if unknown:
        known = [*config_lib.keys(config_lib.base()), *config_lib.base()]
        return f"config key {unknown.group(1)!r} does not exist here{nearest(unknown.group(1), known)}"
    return f"{type(error).__name__}: {message}"


def _checked_overrides(arguments: list[str], config: config_lib.ConfigDict) -> list[str]:
    """Flags with `--config=` removed; every `--config.a.b` must name a field."""
    known, kept = config_lib.keys(config), []
    for argument in arguments:
        if argument.startswith(("--config=", "-config=")):
            continue
        match = re.match(r"--?(?:no)?config\.([^=]+)", argument)
        if match and match.group(1) not in known:
            name = match.group(1)
            inside = [k for k in known if k.startswith(name + ".")]
            listed = ", ".join(inside[:8]) + (", …" if len(inside) > 8 else "")
            more = f" by itself; it is a section: {listed}" if inside else nearest(name, known)
            raise UserError(f"config key {name!r} does not exist{more}")
        name, has_value, value = argument.partition("=")
        if match and has_value and isinstance(config_lib.lookup(config, match.group(1)), tuple):
            # a,b is two words; a tuple that is written out, as ('a, b', 'c'), is read as Python.
            words = value if value[:1] in tuple("([\"'") else repr(tuple(word for word in value.split(",") if word))
            argument = f"{name}={words}"
        kept.append(argument)
    return kept


def _flag_message(message: str, config: config_lib.ConfigDict) -> str:
    match = re.search(r"--?config\.([\w.]+)=?([^:]*)", message)
    if not match or match.group(1) not in config_lib.keys(config):
        return " ".join(message.split())
    key, now = match.group(1), config_lib.lookup(config, match.group(1))
    return f"config.{key} takes a {type(now).__name__} (now {now!r}): {' '.join(message.split())}"


def _without_accelerator() -> None:
    """Where there is no accelerator, says so to JAX: an installed libtpu would search for one, and complain at length."""
    accelerators = ("accel*", "vfio/[0-9]*", "nvidia*", "kfd")
    if not any(True for pattern in accelerators for _ in Path("/dev").glob(pattern)):
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def script() -> NoReturn:
    """The command `jaxtune`: ends as `main` says, at once, even while a step is still being compiled."""
    code = main()
    if "jaxtune.train.compiled" in sys.modules:
        sys.modules["jaxtune.train.compiled"].leave(code)
    sys.exit(code)


if __name__ == "__main__":
    script()
