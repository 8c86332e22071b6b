"""Every tutorial runs: its commands and its Python, page after page, in one folder.

Of a page of docs/tutorials, fences of `bash` and `python` are run in their order, and every word of
a fence of `text` has to stand in what was printed before it; of a dry run every number as well. A
fence with a title is for what is absent here (an accelerator, a server, MIMIC-IV): its command
lines are parsed, the files of configs/ that they name must exist, and lines with `--dry-run` are
run. The title of a fence of `yaml` is the file that the reader saves it as.
"""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from policy.qwen3.config import QWEN3_4B
from sepsis_jax.pipelines import demo
from tests.sepsis_jax.cohort.tiny import NOREPINEPHRINE, SALINE, Tiny
from tests.sepsis_jax.command_line import call
from tests.test_docs import ROOT, execute, fences, logical_lines, parsed

NAVIGATION = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
PAGES = next(entry["Tutorials"] for entry in NAVIGATION if "Tutorials" in entry)
SLOW = {"tutorials/train_a_tiny_agent.md"}  # three trainings and their evaluation
WORD = re.compile(r"[a-zA-Z][\w-]+")
NUMBER = re.compile(r"(?<![\w.])\d[\d.]*(?![\w.])")


def test_every_tutorial_is_in_the_navigation():
    found = {f"tutorials/{path.name}" for path in (ROOT / "docs" / "tutorials").glob("*.md")}
    assert found == set(PAGES) and PAGES[0] == "tutorials/quick_start.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where a reader stands: configurations, a small MIMIC-IV, the shape of Qwen3-4B."""
    root = tmp_path_factory.mktemp("tutorials")
    (root / "configs").symlink_to(ROOT / "configs")
    hospital = Tiny()
    for subject in range(1, 25):
        stay = hospital.septic_stay(subject, age=40 + subject, died=subject % 3 == 0)
        hospital.pressor(stay, subject % 5, 10, NOREPINEPHRINE, 0.02 * subject)
        hospital.infuse(
            stay, 1, 7, SALINE, amount=60.0 * subject, unit="ml", rate=100, rate_unit="mL/hour"
        )
        hospital.output(stay, 3, 150)
    hospital.write(root / "mimic-iv-demo", "csv.gz")
    model = root / "models" / "Qwen3-4B-Instruct-2507"
    model.mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(QWEN3_4B.to_hf(dtype="bfloat16")))
    return root


def command_lines(code):
    """The command lines of a fence; a line with anything else would not be run."""
    lines = [line for line in logical_lines(code) if line.strip() and not line.startswith("#")]
    other = [line for line in lines if not line.startswith("sepsis-jax ")]
    assert not other, f"not of this software, so the fence needs a title: {other}"
    return [shlex.split(line, comments=True)[1:] for line in lines]


def check_titled(code, run):
    """Parses the command lines of a fence for another machine, and runs its dry runs."""
    assert not [name for name in re.findall(r"configs/[\w/.]+\w", code) if not Path(name).exists()]
    for line in logical_lines(code):
        if line.startswith("sepsis-jax "):
            parsed(line)
            if "--dry-run" in line:
                run(shlex.split(line, comments=True)[1:])


def follow(page, capsys):
    """Does what a page says, and compares what is printed with what it shows."""
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed: set[str] = set()
    numbers: set[str] = set()
    dry = False

    def run(words):
        result = call(capsys, *words)
        assert result.status == 0, (words, result.err)
        printed.update(WORD.findall(result.out))
        numbers.update(NUMBER.findall(result.out))

    for fence in fences((ROOT / "docs" / page).read_text()):
        if fence.language == "yaml":
            Path(fence.title).write_text(fence.code)
        elif fence.title:
            check_titled(fence.code, run)
        elif fence.language == "bash":
            for words in command_lines(fence.code):
                run(words)
        elif fence.language == "python":
            execute("\n" * fence.line + fence.code, namespace, page)
            printed.update(WORD.findall(capsys.readouterr().out))
        elif fence.language == "text":
            other = set(WORD.findall(fence.code)) - printed
            if dry:  # sums without a measurement: the same on every machine
                other |= set(NUMBER.findall(fence.code)) - numbers
            assert not other, f"{page}:{fence.line} shows what is not printed"
        else:
            assert fence.language, f"{page}:{fence.line}: a fence without a language is not run"
        dry = bool(fence.title)


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow if page in SLOW else ()) for page in PAGES],
)
def test_tutorial(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(demo, "FRESH_PATIENTS", 60)  # of the comparison with the truth
    if page != PAGES[0] and not Path("runs/demo").exists():  # chosen without the first page
        follow(PAGES[0], capsys)
    follow(page, capsys)
