"""Imports point one way, the package imports nothing from outside itself, and the paper's part needs NumPy only."""

import ast
import functools
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDERS = ("laep_jax", "benchmarks", "experiments", "tests/support", "tests/fault_injection")
# A room may import those before it and itself. Files not named here belong to their folder.
ORDER = [
    {"laep_jax", "errors"},
    {"paths", "commands"},
    {"fields"},
    {"config_parts"},
    {"config", "chips", "files", "distributed", "launch", "switches"},
    {"storage"},
    {"mirror"},
    {"laep"},
    {"gin_config", "settings", "sharding", "report", "importers"},
    {"model", "data", "tracking"},
    {"state"},
    {"checkpoint", "huggingface"},
    {"training", "export"},
    {"evaluation"},
    {"preflight"},
    {"__main__"},
    {"benchmarks"},
    {"experiments"},
    {"tests"},
]
TRAINING_ORDER = [
    {"preemption", "run_state", "watch", "profile", "guard", "controller", "step", "evaluate", "sample"},
    {"resume", "executable", "compile_ahead"},
    {"smaller_model"},
    {"trainer"},
    {"transition"},
    {"decide"},
    {"loop", "initial"},
    {"start"},
    {"check"},
    {"command"},
]
LIMIT = 350  # lines


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def imports() -> dict[str, set[str]]:
    """Every module of ours with the modules of ours that it imports."""
    ours = {folder.partition("/")[0] for folder in FOLDERS}
    found = {}
    for path in files():
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                modules = {f"{node.module}.{alias.name}" for alias in node.names}
                names |= {m if module_exists(m) else node.module for m in modules}
            elif isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
        found[module_name(path)] = {name for name in names if name.split(".")[0] in ours}
    return found


def module_exists(name: str) -> bool:
    path = ROOT / Path(*name.split("."))
    return path.with_suffix(".py").exists() or path.is_dir()


def rank(part: str, order: list[set[str]]) -> int:
    [position] = [i for i, rooms in enumerate(order) if part in rooms]
    return position


def room(name: str) -> str:
    package, _, rest = name.partition(".")
    return rest.partition(".")[0] if package == "laep_jax" and rest else package


def test_imports_point_one_way():
    for name, targets in imports().items():
        for target in targets:
            if room(name) != room(target):
                assert rank(room(target), ORDER) < rank(room(name), ORDER), f"{name} imports {target}"


def test_no_cycle_within_a_room():
    graph = imports()
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for target in graph.get(name, ()):
                visit(target, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_training_is_layered():
    for name, targets in imports().items():
        for target in targets:
            if room(name) == room(target) == "training" and "." in target.removeprefix("laep_jax."):
                a, b = name.split(".")[-1], target.split(".")[-1]
                assert rank(b, TRAINING_ORDER) <= rank(a, TRAINING_ORDER), f"{name} imports {target}"


def test_the_report_reads_files_only():
    for name, targets in imports().items():
        if room(name) == "report":
            rooms = {room(target) for target in targets}
            assert rooms <= {"report", "laep", "files", "errors", "mirror", "config", "commands"}, name


def test_the_papers_part_imports_no_jax():
    names = [
        name
        for name in imports()
        if room(name) in ("laep", "importers", "config", "errors", "files", "launch", "settings", "__main__")
    ]
    code = f"import sys\nfor name in {names}: __import__(name)\nassert not {{'jax', 'flax', 'gin'}} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_stay_short():
    for path in [*files(), ROOT / "train.py"]:
        lines = len(path.read_text().splitlines())
        assert lines <= LIMIT, f"{path} has {lines} lines"
