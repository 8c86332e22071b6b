"""Imports point one way, in no circle, and wake nothing up."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FLOORS = ("worldmodel", "policy", "sepsis_jax")  # from the ground up
HEAVY = {"torch", "vllm", "fastapi", "flask", "uvicorn", "starlette", "tensorflow"}


def modules() -> dict[str, Path]:
    """Every module of the three packages, by its dotted name."""
    found = {}
    for package in FLOORS:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def names_of(module: str, node: ast.AST) -> set[str]:
    """Dotted names that an import statement may bind or load."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names}
    assert isinstance(node, ast.ImportFrom)
    base = node.module or ""
    if node.level:
        package = module.split(".")
        if MODULES[module].name != "__init__.py":
            package = package[:-1]
        package = package[: len(package) - node.level + 1]
        base = ".".join([*package, *([node.module] if node.module else [])])
    return {base, *(f"{base}.{alias.name}" for alias in node.names)}


@cache
def imports(module: str, *, deep: bool) -> frozenset[str]:
    """What a module imports when loaded; with `deep`, also inside its functions."""
    names: set[str] = set()
    stack: list[ast.AST] = [ast.parse(MODULES[module].read_text())]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= names_of(module, node)
        elif is_type_checking(node) or (
            not deep and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        ):
            continue
        else:
            stack.extend(ast.iter_child_nodes(node))
    return frozenset(names)


def packages_of(names: frozenset[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_the_walk_sees_the_whole_house():
    assert {"worldmodel.schema", "worldmodel.simulate.rollout", "sepsis_jax.cli"} <= set(MODULES)
    assert "worldmodel.schema" in imports("worldmodel.episodes", deep=False)
    assert "worldmodel.scaling" not in imports("worldmodel.episodes", deep=False)
    assert "sepsis_jax.pipelines.demo" in imports("sepsis_jax.cli", deep=True)
    assert "sepsis_jax.pipelines.demo" not in imports("sepsis_jax.cli", deep=False)


@pytest.mark.parametrize("package", FLOORS)
def test_no_arrow_upwards(package):
    above = {*FLOORS[FLOORS.index(package) + 1 :], "scripts", "tests"}
    bad = {
        module: sorted(packages_of(imports(module, deep=True)) & above)
        for module in MODULES
        if module.split(".")[0] == package
    }
    assert not {module: found for module, found in bad.items() if found}


def test_no_circle():
    graph = {
        module: {name for name in imports(module, deep=False) if name in MODULES} - {module}
        for module in MODULES
    }
    # A package's __init__ that re-exports its own modules is no circle.
    for module, path in MODULES.items():
        if path.name != "__init__.py":
            parents = {module.rsplit(".", n)[0] for n in range(1, module.count(".") + 1)}
            graph[module] -= parents
    done: set[str] = set()
    trail: list[str] = []

    def visit(module: str) -> None:
        assert module not in trail, f"circle: {[*trail[trail.index(module) :], module]}"
        if module in done:
            return
        trail.append(module)
        for name in sorted(graph[module]):
            visit(name)
        done.add(trail.pop())

    for module in sorted(graph):
        visit(module)


def test_nothing_heavy_at_module_level():
    found = {module: sorted(packages_of(imports(module, deep=False)) & HEAVY) for module in MODULES}
    assert not {module: names for module, names in found.items() if names}


def test_gymnasium_stays_behind_its_own_door():
    users = {name for name in MODULES if "gymnasium" in packages_of(imports(name, deep=True))}
    assert users == {"worldmodel.gym"}
    guests = {name for name in MODULES if "worldmodel.gym" in imports(name, deep=True)}
    assert not guests


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_house_starts_no_device():
    out = python(
        "import sys, importlib\n"
        f"for name in {sorted(MODULES)!r}:\n"
        "    importlib.import_module(name)\n"
        "from jax._src import xla_bridge\n"
        "print(sorted(xla_bridge._backends), sorted({'torch', 'vllm'} & set(sys.modules)))\n"
    )
    assert out.strip() == "[] []"


@pytest.mark.parametrize("command", [[], ["world-model", "train"], ["simulate"]])
def test_help_needs_no_jax(command):
    out = python(
        "import sys\n"
        "from sepsis_jax import cli\n"
        f"sys.argv = ['sepsis-jax', *{command!r}, '--help']\n"
        "try:\n"
        "    cli.main()\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "print([name for name in ('jax', 'flax', 'pandas', 'matplotlib') if name in sys.modules])\n"
    )
    assert out.strip().endswith("[]")
    assert "Usage" in out


def test_the_package_runs_as_a_module_and_tells_its_version():
    done = subprocess.run(
        [sys.executable, "-m", "sepsis_jax", "--version"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"sepsis-jax \d+\.\d+\.\d+\n", done.stdout)
