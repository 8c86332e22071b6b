"""The documentation is complete, and what it shows runs.

Python fences of README.md and docs/*.md are executed, those of one page in order and in one
namespace. A comment before a fence changes that and is not seen by readers of the site:
`<!-- not run: REASON -->` leaves the fence out (its imports are still made), and
`<!-- run before: CODE -->` runs code that the page takes for granted. Tutorials are run by
tests/test_tutorials.py.
"""

import ast
import asyncio
import inspect
import re
import shlex
import shutil
import textwrap
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import pytest
import typer

from scripts.docs_site import api_nav, full_nav, opening, page_of, public_modules, relinked
from sepsis_jax.cli import app
from tests.sepsis_jax.command_line import finish

ROOT = Path(__file__).resolve().parents[1]
MODULES = public_modules(ROOT)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NAMES = [page.relative_to(ROOT).as_posix() for page in PAGES]
OPTIONAL = {"mlcroissant", "stable_baselines3", "torch", "trl"}  # `parity` and `croissant`


RESULTS = sorted((ROOT / "benchmarks").glob("*.json"))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_name_no_folder_of_a_machine(path):
    found = re.findall(r"""(?<=[\s"'=])/(?:[\w.~-]+/)+[\w.~-]*""", path.read_text())
    assert not found


# Docstrings


class Definition(NamedTuple):
    name: str
    node: ast.AST
    owner: ast.ClassDef | None


@cache
def definitions(module):
    """The public functions, classes and methods that a module defines, and the module itself."""
    tree = ast.parse(MODULES[module].read_text())
    found = [Definition(module, tree, None)]

    def walk(body, prefix, owner):
        for node in body:
            kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
            if isinstance(node, kinds) and not node.name.startswith("_"):
                found.append(Definition(f"{prefix}.{node.name}", node, owner))
                if isinstance(node, ast.ClassDef):
                    walk(node.body, f"{prefix}.{node.name}", node)

    walk(tree.body, module, None)
    return found


def parameters(node, owner):
    """Names that an `Args:` section may document: of a class, those of its constructor."""
    if isinstance(node, ast.ClassDef):
        fields = {one.target.id for one in node.body if isinstance(one, ast.AnnAssign)}
        init = [one for one in node.body if getattr(one, "name", "") in ("__init__", "__new__")]
        return fields.union(*(parameters(one, node) for one in init))
    given = node.args
    starred = [one for one in (given.vararg, given.kwarg) if one]
    return {one.arg for one in (*given.posonlyargs, *given.args, *given.kwonlyargs, *starred)}


def documented(docstring):
    """Names in the `Args:` section; `a, b: ...` documents two."""
    section = re.search(r"^Args:\n((?:[ ]+.*\n?|\n)+)", docstring, re.MULTILINE)
    lines = textwrap.dedent(section[1]).splitlines() if section else []
    heads = [line.partition(":")[0] for line in lines if re.match(r"\*{0,2}\w[\w, *]*:", line)]
    return {name.strip(" *") for head in heads for name in head.split(",")}


def test_documented_reads_sections_of_this_style():
    text = "Does.\n\nArgs:\n  a, b: both; see\n    c: no.\n  **rest: more.\n\nReturns:\n  d: x"
    assert documented(text) == {"a", "b", "rest"}


@pytest.mark.parametrize("package", ["worldmodel", "policy", "sepsis_jax"])
def test_everything_public_has_a_docstring(package):
    missing = [
        definition.name
        for module in MODULES
        if module.split(".")[0] == package
        for definition in definitions(module)
        if not ast.get_docstring(definition.node)
    ]
    assert not missing


def test_documented_arguments_exist():
    wrong = {
        definition.name: sorted(unknown)
        for module in MODULES
        for definition in definitions(module)
        if not isinstance(definition.node, ast.Module)
        and (
            unknown := documented(ast.get_docstring(definition.node) or "")
            - parameters(definition.node, definition.owner)
        )
    }
    assert not wrong


# The site


def test_every_public_module_is_in_the_reference():
    pages = re.findall(r"api/[\w/]+\.md", str(api_nav(MODULES)))
    assert sorted(pages) == sorted(page_of(name, path) for name, path in MODULES.items())
    assert {"worldmodel", "policy.qwen3", "sepsis_jax.cli"} <= set(MODULES)
    assert not [name for name in MODULES if "._" in name]


def test_every_page_is_in_the_navigation(tmp_path):
    (tmp_path / "decisions").mkdir()
    for name in ("a.md", "new.md", "decisions/b.md", "decisions/index.md"):
        (tmp_path / name).touch()
    nav = full_nav([{"Guide": ["a.md"]}], tmp_path, {})
    assert nav[0] == {"Guide": ["a.md", "new.md"]}
    assert nav[2] == {"Decisions": ["decisions/index.md", "decisions/b.md"]}


def test_links_outside_the_docs_become_names_or_pages_of_the_reference():
    page = (
        "[one](../configs/agent_tiny.yaml) [`cli.py`](../sepsis_jax/cli.py) [b](b.md#c) ![i](i.png)"
    )
    assert relinked(page, "a.md", MODULES) == (
        "one (`configs/agent_tiny.yaml`) [`cli.py`](api/sepsis_jax/cli.md) [b](b.md#c) ![i](i.png)"
    )
    assert relinked("[a](../a.md)", "decisions/b.md", MODULES) == "[a](../a.md)"
    with pytest.raises(FileNotFoundError, match=r"docs/a\.md links to gone"):
        relinked("[x](../gone)", "a.md", MODULES)


def test_the_opening_of_the_readme_links_as_a_page_of_the_docs():
    text = opening("# T\n\n[a](docs/a.md) [b](#c)\n\n## D\n")
    assert text == "# T\n\n[a](a.md) b"


def test_comments_of_fields_are_shown(tmp_path):
    griffe = pytest.importorskip("griffe", reason="needs the tools of `make docs`")
    from scripts.docs_site import FieldComments

    (tmp_path / "one.py").write_text(
        "class A:\n    x: int  # [N] of x\n    y: int\n    z: str = '#'  # type: ignore\n"
    )
    found = griffe.load(
        "one", search_paths=[tmp_path], extensions=griffe.load_extensions(FieldComments)
    )["A"]
    assert found["x"].docstring.value == "[N] of x"
    assert found["y"].docstring is None and found["z"].docstring is None


# Fences and commands


class Fence(NamedTuple):
    language: str
    code: str
    line: int
    before: str  # code of a `run before` comment
    reason: str | None  # of a `not run` comment
    title: str = ""


FENCE = re.compile(
    r"(?:<!-- (?P<kind>not run|run before):\s*(?P<comment>.*?)\s*-->\n+)?"
    r"^```(?P<language>\w*)(?: title=\"(?P<title>[^\"\n]*)\")?\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)


def fences(text):
    return [
        Fence(
            found["language"],
            found["code"],
            text.count("\n", 0, found.start("code")),
            found["comment"] if found["kind"] == "run before" else "",
            found["comment"] if found["kind"] == "not run" else None,
            found["title"] or "",
        )
        for found in FENCE.finditer(text)
    ]


def test_fences_are_found_with_their_comments():
    text = (
        "<!-- not run: why -->\n```python\na\n```\n\n<!-- run before:\nx = 1\n-->\n"
        '```sh title="on a GPU"\nb\n```\n'
    )
    one, two = fences(text)
    assert one == Fence("python", "a\n", 2, "", "why")
    assert two == Fence("sh", "b\n", 9, "x = 1", None, "on a GPU")


def logical_lines(text):
    return re.sub(r"\s*\\\n\s*", " ", text).splitlines()


def shell_lines(path):
    """Command lines of a page's fences, or of the comments of a YAML file."""
    text = path.read_text()
    if path.suffix == ".yaml":
        text = "\n".join(line[1:] for line in text.splitlines() if line.startswith("#"))
        return [line.strip() for line in logical_lines(text)]
    shown = [one for one in fences(text) if one.language in ("", "sh", "bash")]
    return [line for one in shown for line in logical_lines(one.code)]


def inline_code(text):
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", text))


CLI = typer.main.get_command(app)


def inner(command):
    """The commands of a group; Typer's groups need not be Click's."""
    return getattr(command, "commands", {})


def command_of(words):
    """The command that words name, and the words after it."""
    command, words = CLI, list(words)
    while words and words[0] in inner(command):
        command = inner(command)[words.pop(0)]
    default = getattr(command, "default_command", None)
    if default and words and not words[0].startswith("-"):
        command = inner(command)[default]
    return command, words


def epilogs(command=CLI):
    yield command.epilog or ""
    for one in inner(command).values():
        yield from epilogs(one)


def command_lines():
    """(where, line) of everything that is shown as a whole command line of `sepsis-jax`."""
    sources = [*PAGES, *sorted((ROOT / "configs").glob("*.yaml"))]
    found = [(path.name, line) for path in sources for line in shell_lines(path)]
    found += [("--help", text.removeprefix("Example: ")) for text in epilogs()]
    return [(where, line) for where, line in found if line.startswith("sepsis-jax ")]


def test_command_lines_are_found():
    where = {name for name, _ in command_lines()}
    assert {"README.md", "training.md", "policies_synthetic.yaml", "--help"} <= where


def parsed(line):
    """The words of a command line after the command, which must take them; nothing is run."""
    command, words = command_of(shlex.split(line, comments=True)[1:])
    command.make_context("sepsis-jax", list(words), allow_extra_args=False)
    assert not inner(command) or not words or words[0].startswith("-"), f"no command {words[0]}"
    return words


@pytest.mark.parametrize(
    "line", ["sepsis-jax sweep --nothing 3", "sepsis-jax policy tarin", "sepsis-jax bench --out"]
)
def test_wrong_command_lines_do_not_parse(line):
    with pytest.raises((Exception, SystemExit)):
        parsed(line)
    parsed("sepsis-jax bench --out runs/bench")


@pytest.mark.parametrize(("where", "line"), command_lines())
def test_command_lines_parse(where, line):
    if line.startswith("sepsis-jax demo. "):
        return  # what `make demo` prints
    words = parsed(line)
    for option, value in pairwise(words):
        if option == "--config" and "/" in value:
            assert (ROOT / value).is_file(), value


@pytest.mark.parametrize("page", NAMES)
def test_commands_in_the_text_exist(page):
    """Commands, options, targets and scripts that are named in passing, with placeholders."""
    text = (ROOT / page).read_text()
    for code in [*inline_code(text), *shell_lines(ROOT / page)]:
        words = code.split("#")[0].split()
        if "sepsis-jax" in words and not code.startswith("sepsis-jax demo. "):
            command, rest = command_of(words[words.index("sepsis-jax") + 1 :])
            known = {
                name for option in command.params for name in (*option.opts, *option.secondary_opts)
            }
            unknown = [word for word in rest if word.startswith("--") and word != "--help"]
            unknown = [word for word in unknown if word.partition("=")[0] not in known]
            assert not unknown, f"{code}: {unknown}"
            bare = not inner(command) or not rest or rest[0].startswith(("-", "."))
            assert bare, f"{code}: no command {rest[0]}"
        if words[:1] == ["make"] and len(words) > 1:
            targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            assert words[1] in targets, code
        if words[:1] == ["python"] and len(words) > 1 and words[1].startswith("scripts/"):
            script = (ROOT / words[1]).read_text()
            assert not [w for w in words[2:] if w.startswith("--") and f'"{w}"' not in script], code


@pytest.mark.parametrize("page", NAMES)
def test_files_in_the_text_exist(page):
    folders = "configs|scripts|docs|tests|benchmarks|policy|worldmodel|sepsis_jax"
    pattern = rf"(?<![\w/])(?:{folders})/[\w/.*-]+\.(?:yaml|py|md|json|png|svg|sql|j2)\b"
    named = set(re.findall(pattern, (ROOT / page).read_text()))
    assert not [name for name in named if not list(ROOT.glob(name))]


def execute(code, namespace, where):
    """Runs code, which may use `await` at the top."""
    compiled = compile(code, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    result = eval(compiled, namespace)
    if inspect.iscoroutine(result):
        asyncio.run(result)


def imports_of(code):
    tree = ast.parse(code)
    kept = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return "\n".join(map(ast.unparse, kept))


@pytest.fixture(scope="module")
def folder(first_cohort, first_model, tmp_path_factory):
    """A folder with the files that the pages' snippets read, all of them small."""
    from policy.checkpoint import save_policy
    from policy.simple import GuidelineRules
    from policy.testing.tiny_qwen3 import make_tiny

    root = tmp_path_factory.mktemp("docs")
    runs = root / "runs"
    cohort, model = runs / "demo" / "cohort", runs / "demo" / "model"
    shutil.copytree(first_cohort, cohort)
    shutil.copytree(first_model, model)
    (runs / "synthetic").symlink_to(cohort)
    (runs / "model").symlink_to(model)
    save_policy(GuidelineRules(), runs / "iql")
    finish(
        "sweep", "--model", model, "--episodes", cohort, "--behavior", runs / "iql",
        "--set", "patients=4", "--steps", "0,1", "--plan", "constant", "--plan", "deviations",
        "--plan", "clinician", "--horizon", 6, "--samples", 2, "--out", runs / "sweep",
    )  # fmt: skip
    # Token ids of the pages are those of the real vocabulary.
    make_tiny(root / "models" / "Qwen3-4B-Instruct-2507", hidden=64, vocab=151_936)
    return root


RUN = [
    name
    for name, page in zip(NAMES, PAGES, strict=True)
    if "```python" in page.read_text() and page.parent.name != "tutorials"
]


@pytest.mark.parametrize("page", RUN)
def test_python_of_the_page_runs(page, folder, monkeypatch):
    monkeypatch.chdir(folder)
    namespace: dict[str, object] = {"__name__": "__main__"}
    absent = None
    for fence in fences((ROOT / page).read_text()):
        if fence.language != "python":
            continue
        where = f"{page}:{fence.line}"
        code = imports_of(fence.code) if fence.reason else fence.code
        try:
            execute(fence.before, namespace, f"{where}, before")
            execute("\n" * fence.line + code, namespace, page)
        except ModuleNotFoundError as error:
            if error.name not in OPTIONAL:
                raise
            absent = error.name
    if absent:
        pytest.skip(f"{absent} is not installed; the rest of the page ran")
