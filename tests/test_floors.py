"""A room imports only from floors below its own, rooms on one floor not each other; families never import families."""

from __future__ import annotations

import ast
from pathlib import Path

import jaxtune
from jaxtune.models import FAMILIES

ROOT = Path(jaxtune.__file__).parent
FLOORS = [
    {
        "config",
        "config_methods",
        "config_retention",
        "config_review",
        "registry",
        "types",
        "report_plots",
        "pictures",
        "hosts",
        "chips",
        "fetch",
        "archives",
        "indexes",
        "validation",
        "validation_merging",
        "validation_methods",
        "validation_retain",
        "validation_retention",
        "validation_review",
        "workdir",
    },
    {"sharding", "models", "data", "moments", "statistics"},
    {"adapters", "objectives", "optim", "rewards"},  # rewards: what is optimised, where it is no loss
    {"weights", "generate", "checkpoint", "tracking", "report", "model_card"},
    {"train"},
    {"evals", "retrieval", "explain", "plan", "review", "serve", "selftrain"},
    {
        "run",
        "verbs",
        "lr_find",
        "sweep",
        "merge",
        "frontier",
        "lineage",
        "update",
        "experts",
        "guide",
        "guidance",
        "judging",
        "bias_audit",
    },
    {"launch"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
TOGETHER = {
    "run": {"verbs"},
    "merge": {"verbs"},
    "fetch": {"archives", "indexes", "types"},
    "indexes": {"archives", "types"},
    "config": {"config_methods", "config_retention", "config_review", "types"},
    "validation": {"config", "types", "validation_methods", "validation_retention", "validation_review"},
    "validation_methods": {"config", "types"},
    "validation_retain": {"config", "types", "validation_methods"},
    "validation_merging": {"config", "types"},
    "validation_review": {"config", "types"},
    "validation_retention": {"config", "types", "validation_merging", "validation_retain"},
    "registry": {"types"},
    "archives": {"types"},
    "workdir": {"types"},
    "hosts": {"types"},
    "update": {"lineage", "sweep"},
    "guide": {"guidance", "lineage", "run", "sweep"},
    "guidance": {"lineage"},
    "chips": {"types"},
    "frontier": {"sweep"},
    "judging": {"verbs"},
    "model_card": {"report"},
    "bias_audit": {"sweep"},
}


def imports(path: Path) -> set[str]:
    """Dotted jaxtune modules that a file imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jaxtune":
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("jaxtune.")}
    return found


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_room_is_on_a_floor() -> None:
    assert {room_of(p) for p in ROOT.rglob("*.py")} - {"__init__"} <= set(FLOOR)


def test_imports_go_down() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        room = room_of(path)
        for name in imports(path):
            other = name.split(".")[1]
            if other not in FLOOR or other == room or other in TOGETHER.get(room, ()):
                continue
            if FLOOR[other] >= FLOOR[room]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert not wrong


def test_families_do_not_import_families() -> None:
    files = {ROOT / f"{module.removeprefix('jaxtune.').replace('.', '/')}.py" for module in FAMILIES.values()}
    for path in files:
        others = {module for module in FAMILIES.values() if not path.match(f"*{module.rsplit('.', 1)[-1]}.py")}
        assert not {name for name in imports(path) if name.startswith(tuple(others))}


def test_files_and_functions_stay_short() -> None:
    long = []
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if text.count("\n") > 400:
            long.append(f"{path.name}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno > 60 and path.name != "loop.py":
                long.append(f"{path.name}: {node.name} has {node.end_lineno - node.lineno} lines")
    assert not long


def test_importing_starts_nothing() -> None:
    """Importing jaxtune sets no flag and starts no device; the core imports neither torch nor TensorFlow."""
    import subprocess
    import sys

    code = (
        "import sys, jaxtune.run, jax; from jax._src import xla_bridge as x; "
        "print(x.backends_are_initialized(), *(m for m in ('torch', 'tensorflow', 'gcsfs') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
