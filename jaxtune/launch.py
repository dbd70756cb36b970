"""Entry: `python -m jaxtune.launch [train|evaluate|generate|chat|export|plan] --config=FILE [--config.a.b=v] [--workdir=DIR]`.

Reads the verb and the config, starts the distributed runtime where there is one, and hands over to `run.py`. A user's
mistake ends in one line on stderr and exit code 2; code 75 says "saved, run me again to resume".
"""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import config_flags

from jaxtune import config as config_lib
from jaxtune.types import RESUME_EXIT_CODE, UserError, nearest

VERBS = {
    "train": "fine-tune, measure before and after, export, report (the default)",
    "evaluate": "measure a model, or a run's result, on held-out rows",
    "generate": "answer a file of prompts",
    "chat": "talk to the model in the terminal",
    "export": "write a run's result as a PEFT adapter or a Hugging Face model folder",
    "plan": "compile the training step for a TPU that is not here, and say what it needs",
}
USAGE = (
    "usage: python -m jaxtune.launch [VERB] --config=configs/X.py [--config.a.b=value] [--workdir=DIR] [--dry_run]\n"
    + "\n".join(f"  {verb:<9} {what}" for verb, what in VERBS.items())
    + "\n  --dry_run prints the first batch token by token, what trains, and the schedule; then stops"
    + "\n  several hosts: --coordinator=HOST:PORT --num_processes=N --process_id=I (found by themselves on Cloud TPU)"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one verb; returns the process's exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if any(a in ("-h", "--help", "-help") for a in arguments) or not arguments:
        print(USAGE)
        return 0
    try:
        return _dispatch(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from jaxtune.train.loop import Preempted

        if isinstance(error, Preempted):
            print(f"{error}; run the same command with --config.checkpoint.resume=True to go on", file=sys.stderr)
            return RESUME_EXIT_CODE
        if isinstance(error, OSError) and error.errno in (28, 122):
            print(f"error: disk full: {error}; free space and run again", file=sys.stderr)
            return 2
        raise


def _dispatch(arguments: list[str]) -> int:
    verb, options, values = _parse(arguments)
    from jaxtune.tracking import quiet_libraries

    quiet_libraries()
    _distribute(values)
    from jaxtune import run

    config_lib.validate(options)
    if values.workdir:
        with options.unlocked():
            options.workdir = values.workdir
    if not options.workdir:
        options.workdir = str(Path("runs") / options.name)
    if verb == "train" and values.dry_run:
        run.dry_run(options)
    elif values.dry_run:
        raise UserError(f"--dry_run goes with train, not with {verb}")
    else:
        getattr(run, verb)(options)
    return 0


def _parse(arguments: list[str]) -> tuple[str, config_lib.ConfigDict, flags.FlagValues]:
    """Splits the command line into verb, config and other flags; a misspelt one is answered with the nearest."""
    arguments = _joined(arguments)
    words = [a for a in arguments if not a.startswith("-")]
    verb = words[0] if words else "train"
    if verb not in VERBS or len(words) > 1:
        wrong = words[1] if len(words) > 1 else verb
        raise UserError(f"unknown verb {wrong!r}{nearest(wrong, list(VERBS))}; verbs: {', '.join(VERBS)}")
    rest = [a for a in arguments if a is not verb]
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", "", "folder of the run", flag_values=values)
    flags.DEFINE_bool("dry_run", False, "show the first batch, what trains and the schedule; then stop", flag_values=values)
    flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("num_processes", 0, "processes in all", flag_values=values)
    flags.DEFINE_integer("process_id", -1, "this process's number", flag_values=values)
    known = ["config", *values]
    for argument in rest:
        name = re.match(r"--?(?:no)?([^=.]*)", argument).group(1)  # type: ignore[union-attr]
        if name not in known and f"no{name}" not in known:
            raise UserError(f"unknown flag {argument.split('=')[0]!r}{nearest(name, known)}; flags: {', '.join('--' + k for k in known)}")
    base = _config_file(rest)
    overrides = _checked_overrides(rest, base)
    config_flags.DEFINE_config_dict("config", base, lock_config=True, flag_values=values, sys_argv=["jaxtune", *overrides])
    try:
        values(["jaxtune", *overrides])
    except (flags.Error, ValueError, TypeError, AttributeError) as error:
        raise UserError(_flag_message(str(error), base)) from None
    return verb, values.config, values


def _joined(arguments: list[str]) -> list[str]:
    """`--flag value` as `--flag=value`; a verb after a flag stays a verb."""
    joined: list[str] = []
    for argument in arguments:
        bare = joined and re.fullmatch(r"--?(config(\.[\w.]+)?|workdir|coordinator|num_processes|process_id)", joined[-1])
        if bare and not argument.startswith("--") and argument not in VERBS:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def _config_file(arguments: list[str]) -> config_lib.ConfigDict:
    named = [a.split("=", 1)[1] for a in arguments if a.startswith(("--config=", "-config="))]
    if not named:
        raise UserError("no config: give --config=configs/quickstart.py, or a file of your own with get_config()")
    path = Path(named[-1])
    if not path.is_file():
        near = nearest(path.name, [p.name for p in path.parent.glob("*.py")]) if path.parent.is_dir() else ""
        raise UserError(f"config file {path} does not exist{near}")
    if path.suffix == ".json":
        return config_lib.from_json(path.read_text())
    spec = importlib.util.spec_from_file_location("jaxtune_user_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config = module.get_config()
    except (AttributeError, KeyError, TypeError, SyntaxError, NameError, ImportError) as error:
        message = str(error).strip("\"'")
        raise UserError(f"{path}: {type(error).__name__}: {message}{_config_hint(message)}") from None
    if not isinstance(config, config_lib.ConfigDict):
        raise UserError(f"{path}: get_config() returned {type(config).__name__}; expected the ConfigDict of jaxtune.config.base()")
    return config


def _config_hint(message: str) -> str:
    quoted = re.findall(r"[\"']([A-Za-z_]\w*)[\"']", message)
    return nearest(quoted[0], config_lib.keys(config_lib.base())) if quoted and "did you mean" not in message.lower() else ""


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
            more = f"; it is a section: {', '.join(inside[:8])}" if inside else nearest(name, known)
            raise UserError(f"config key {name!r} does not exist{more}")
        kept.append(argument)
    return kept


def _flag_message(message: str, config: config_lib.ConfigDict) -> str:
    match = re.search(r"--?config\.([\w.]+)=?([^:]*)", message)
    if not match or match.group(1) not in config_lib.keys(config):
        return " ".join(message.split())
    key, now = match.group(1), config_lib.lookup(config, match.group(1))
    return f"config.{key} takes a {type(now).__name__} (now {now!r}): {' '.join(message.split())}"


def _distribute(values: flags.FlagValues) -> None:
    """Joins the other processes of a multi-host run: by flags, or by what Cloud TPU tells each host."""
    import jax

    if values.coordinator:
        if values.num_processes < 1 or not 0 <= values.process_id < values.num_processes:
            raise UserError(f"--coordinator needs --num_processes=N and --process_id=0..N-1; got {values.num_processes} and {values.process_id}")
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    elif len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")) > 1:
        jax.distributed.initialize()


if __name__ == "__main__":
    sys.exit(main())
