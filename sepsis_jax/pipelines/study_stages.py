"""Stages of a study: what each depends on, which are done, and how one that was killed goes on.

A stage is known by the hash of its settings, of the stages that it reads, and of files from
outside. One that is done with the same hash is not run again; one that was begun with the same
hash goes on; anything else is removed and begun anew.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel.errors import InputError
from worldmodel.files import check_replaceable, read_json, remove_unfinished, write_json

LEDGER = "study.json"
DONE, GOES_ON, TO_RUN = "done", "goes on", "to run"
KIND = "sepsis-jax study"


@dataclass(frozen=True)
class Stage:
    """One step of a study.

    Attributes:
      name: of its folder.
      settings: JSON of all that its result depends on, beside the stages that it reads.
      reads: names of earlier stages.
      run: writes its folder, or goes on with it; called with the folder and a progress.
    """

    name: str
    settings: JsonDict
    reads: tuple[str, ...]
    run: Callable[[Path, Progress], object]


def fingerprints(stages: Sequence[Stage]) -> dict[str, str]:
    """Hash of each stage, by name.

    Raises:
      InputError: a stage reads one that does not come before it.
    """
    found: dict[str, str] = {}
    for stage in stages:
        missing = [name for name in stage.reads if name not in found]
        if missing:
            raise InputError(f"{stage.name}: reads {', '.join(missing)}, which is not before it")
        content = {"settings": stage.settings, "reads": {name: found[name] for name in stage.reads}}
        text = json.dumps([stage.name, content], sort_keys=True)
        found[stage.name] = hashlib.sha256(text.encode()).hexdigest()
    return found


def plan(out: Path, stages: Sequence[Stage]) -> dict[str, str]:
    """What would become of each stage: DONE, GOES_ON or TO_RUN."""
    wanted, ledger = fingerprints(stages), _ledger(out)
    found = {}
    for stage in stages:
        own = wanted[stage.name]
        if not (out / stage.name).exists():
            found[stage.name] = TO_RUN
        elif ledger["done"].get(stage.name) == own:
            found[stage.name] = DONE
        else:
            begun = ledger["begun"].get(stage.name) == own
            found[stage.name] = GOES_ON if begun else TO_RUN
    return found


def run_all(out: Path, stages: Sequence[Stage], progress: Progress = silent) -> dict[str, str]:
    """Runs all stages that are not done, and returns what `plan` said before.

    Args:
      out: folder of the study; each stage has a folder in it, and `study.json` says which are done.
      stages: in order.
      progress: called with (phase, share done).

    Raises:
      InputError: something else is in the way, or as the stages.
    """
    check_replaceable(out, LEDGER)
    out.mkdir(parents=True, exist_ok=True)
    remove_unfinished(out)
    wanted, ledger, todo = fingerprints(stages), _ledger(out), plan(out, stages)
    for number, stage in enumerate(stages):
        if todo[stage.name] == DONE:
            continue
        if todo[stage.name] == TO_RUN:
            for folder in _folders(out, stage.name):
                shutil.rmtree(folder)
        ledger["done"].pop(stage.name, None)
        ledger["begun"][stage.name] = wanted[stage.name]
        write_json(out / LEDGER, ledger)

        def tell(phase: str, share: float, stage: Stage = stage, number: int = number) -> None:
            progress(f"{stage.name}: {phase}", (number + share) / len(stages))

        tell("begins", 0.0)
        stage.run(out / stage.name, tell)
        del ledger["begun"][stage.name]
        ledger["done"][stage.name] = wanted[stage.name]
        write_json(out / LEDGER, ledger)
    return todo


def stages_done(out: Path) -> dict[str, str]:
    """Hash of each stage of a study that is done, in the order in which they were done."""
    return dict(_ledger(out)["done"])


def _folders(out: Path, name: str) -> list[Path]:
    """The stage's folder, and what an unfinished run keeps beside it."""
    return [path for path in (out / name, out / f"{name}.training") if path.exists()]


def _ledger(out: Path) -> dict[str, JsonDict]:
    file = out / LEDGER
    if not file.exists():
        return {"done": {}, "begun": {}}
    found = read_json(file)
    if not isinstance(found, dict) or not {"done", "begun"} <= set(found):
        raise InputError(f"{file}: not of a study; choose another folder")
    return found
