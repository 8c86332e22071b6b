"""Names are the field's standard terms: the words that they replaced stay away."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".j2", ".sh", ".sbatch", ".toml"}

# A word, and the standard term that is used instead of it.
INSTEAD = {
    "ward|wards": "EnvPool, pool",
    "beds?": "slot",
    "nurses?": "worker",
    "Admission": "EnvBatch",
    "admit": "reset_batch",
    "clinics?|Clinic": "EpisodeRunner, runner",
    "Observer|observer": "StateScorer, state_scorer",
    "Job": "RolloutSpec",
    "Played": "RolloutResult",
    "Player|play_block": "ShardedRollout, rollout_block",
    "View|view_of|view_at|history_of": "Observation, observe, history_from_observation",
    "Past": "ObservationHistory",
    "luck|with_luck": "random key, random numbers, with_key",
    "[Rr]egimens?": "PlanSet, plan_set",
    "teachers?": "demonstrator, demonstrations",
    "[Pp]upils?": "TrainableModel, trainable",
    "exams?": "evaluation",
    "sits": "is evaluated",
    "rivals?": "baselines",
    "Credits|CreditConfig": "Advantages, AdvantageConfig",
    "probing": "qa_eval",
}
MODULES = {
    "ward", "clinic", "clinics", "play", "regimens", "teachers", "credit", "probing", "wording",
    "cases", "updates", "ours", "theirs", "setting", "inside", "view", "engine",
}  # fmt: skip
# A table of renamed settings, whose keys are the old names.
RENAMING = re.compile(r'^\s*"[\w.]+": "\w+",$')
HERE = Path(__file__).relative_to(ROOT)


def tracked() -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files"], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout.splitlines()
    return [Path(name) for name in names if Path(name) != HERE and (ROOT / name).is_file()]


FILES = tracked()


@pytest.mark.parametrize(("words", "instead"), INSTEAD.items())
def test_no_replaced_word(words, instead):
    pattern = re.compile(rf"\b(?:{words})\b")
    found = [
        f"{path}:{number}: {line.strip()}"
        for path in FILES
        if path.suffix in SUFFIXES
        for number, line in enumerate((ROOT / path).read_text().splitlines(), 1)
        if pattern.search(line) and not RENAMING.match(line)
    ]
    assert not found, f"use {instead}:\n" + "\n".join(found)


def test_no_dataclass_whose_class_jax_forgets():
    pattern = re.compile(r"from flax import .*struct|flax\.struct|register_dataclass\(")
    code = [path for path in FILES if path.suffix == ".py" and path.name != "struct.py"]
    found = [str(path) for path in code if pattern.search((ROOT / path).read_text())]
    assert not found, f"use worldmodel.struct: {found}"


def test_no_replaced_module():
    found = [str(path) for path in FILES if path.suffix == ".py" and path.stem in MODULES]
    assert not found


def test_the_number_of_modules_stays_small():
    packages = ("worldmodel", "policy", "sepsis_jax", "scripts")
    count = sum(path.suffix == ".py" and path.parts[0] in packages for path in FILES)
    assert count <= 296


def untyped(path: Path) -> list[int]:
    """Lines of a module that use `Any`, but for imports."""
    names = (node for node in ast.walk(ast.parse((ROOT / path).read_text())))
    return sorted({n.lineno for n in names if isinstance(n, ast.Name) and n.id == "Any"})


LIBRARY = [
    path
    for path in FILES
    if path.suffix == ".py" and path.parts[0] in ("worldmodel", "policy", "sepsis_jax")
]


def test_few_values_have_no_type():
    lines = {str(path): untyped(path) for path in LIBRARY}
    assert sum(map(len, lines.values())) < 100, {path: at for path, at in lines.items() if at}


@pytest.mark.parametrize("path", [path for path in LIBRARY if untyped(path)], ids=str)
def test_the_first_any_of_a_module_has_a_reason(path):
    lines = (ROOT / path).read_text().splitlines()
    first = untyped(path)[0] - 1
    assert "#" in lines[first] or lines[first - 1].lstrip().startswith("#")
