"""Python that reproduces what a page shows, through public names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sepsis_jax.explore.address import PatientAddress, plan_text
from sepsis_jax.explore.charts import LETTERS
from sepsis_jax.explore.explorer import VALUES, Explorer
from sepsis_jax.report import words
from worldmodel.simulate.plans import Plan

_HEAD = '"""{title}  Research software. Not for clinical use."""\n'


def patient_code(explorer: Explorer, address: PatientAddress) -> str:
    """Code that simulates the futures of a patient's page and prints its numbers."""
    shown, _ = explorer.shown_plans(address)
    sources, step = explorer.sources, address.step
    title = f"Stay {address.stay} from hour {step * explorer.hours:g}."
    lines = [
        _HEAD.format(title=title),
        "import jax",
        "import numpy as np",
        "",
        *(["from policy import action_probs, find"] if explorer.policies else []),
        *(
            ["from sepsis_jax.pipelines.example_futures import true_courses"]
            if _shows_truth(explorer, address)
            else []
        ),
        "from sepsis_jax.pipelines.world_model import outcome_table",
        "from worldmodel import load_episodes, load_world_model, rollout, start_history",
        *(
            ["from worldmodel.episode_files import load_manifest"]
            if _shows_truth(explorer, address)
            else []
        ),
        "from worldmodel.simulate.plans import parse_sequence",
        "from worldmodel.simulate.statistics import disagreement",
        "",
        f"world_model = load_world_model({_path(sources.model)})",
        f"episodes = load_episodes({_path(sources.episodes)})",
        f"stay = episodes.select(np.asarray(episodes.stay_id) == {address.stay})",
        "texts = [  # vasopressor,fluid per step; the last pair goes on",
        *(
            f'    "{letter}={plan_text(plan.actions)}",{_said(plan)}'
            for letter, plan in zip(LETTERS, shown, strict=False)
        ),
        "]",
        f"plans = [parse_sequence(text, horizon={explorer.horizon}) for text in texts]",
        "futures = rollout(",
        "    world_model,",
        f"    jax.random.key({sources.seed}),",
        f"    start_history(world_model, stay, step={step}),",
        "    np.stack([plan.actions for plan in plans]),",
        f"    samples={explorer.samples},",
        f"    features={VALUES!r},",
        ")",
        "outcomes = outcome_table(futures, plans)",
        "mortality = np.asarray(futures.mortality)",
        'outcomes["disagreement"] = disagreement(mortality, world_model.num_members)[0]',
        "print(outcomes.to_string())",
    ]
    if explorer.world_model.is_recurrent:
        lines.append(
            "survival = 1 - np.asarray(futures.death[0]).mean(1).cumsum(-1)  # [plan, step]"
        )
        lines.append("print(survival.round(3))")
    if _shows_truth(explorer, address):
        lines += [
            f"manifest = load_manifest({_path(sources.episodes)})",
            f"truth = true_courses(stay, {step}, plans, manifest, {explorer.hours:g})",
            "print(truth.outcomes)",
        ]
    if explorer.policies:
        lines += [
            f"for text in {list(sources.policies)!r}:",
            "    name, policy = find(text)",
            f"    probs = action_probs(policy, stay)[0, {step}]  # [25], 5 * vasopressor + fluid",
            "    print(name, divmod(int(probs.argmax()), 5), probs.max())",
        ]
    return "\n".join(lines) + "\n"


def patients_code(explorer: Explorer, choice: Mapping[str, str]) -> str:
    """Code that lists the stays of the first page.

    Args:
      explorer: whose episodes are listed.
      choice: split, column to sort by and whether it falls, as the address has them.
    """
    split = choice["split"]
    of_split = "" if split == "all" else f'.of_split("{split}")'
    order = f'"{choice["sort"]}", ascending={choice["falls"] == "0"}'
    return "\n".join(
        [
            _HEAD.format(title="Recorded stays, by their first row."),
            "from sepsis_jax.explore.patients import stay_table",
            "from worldmodel import load_episodes",
            "",
            f"episodes = load_episodes({_path(explorer.sources.episodes)}){of_split}",
            f'print(stay_table(episodes).sort_values({order}, kind="stable").to_string())',
            "",
        ]
    )


def dialogue_code(folder: Path, patient: int, first: int, last: int, *, closes: bool) -> str:
    """Code that prints the messages of one decision of an agent.

    Args:
      folder: of the run.
      patient: whose dialogue it is.
      first, last: turns, from 0; the last is not included.
      closes: the decision is the last, which the closing message answers.
    """
    return "\n".join(
        [
            _HEAD.format(title=f"Dialogue about patient {patient}, turns {first} to {last - 1}."),
            "from pathlib import Path",
            "",
            "from policy.agent.records import RECORDS_FILE, last_attempts",
            "from policy.agent.transcript import entries",
            "",
            f"record = last_attempts(Path({_path(folder)}) / RECORDS_FILE)[{patient}]",
            f'record["turns"] = record["turns"][{first}:{last}]',
            *([] if closes else ['record["closing"] = ""']),
            "for entry in entries(record):",
            '    print(f"{entry.speaker}\\n{entry.text}\\n")',
            "",
        ]
    )


def _shows_truth(explorer: Explorer, address: PatientAddress) -> bool:
    return address.truth and explorer.knows_truth


_LONGEST = 60  # letters of a comment


def _said(plan: Plan) -> str:
    """A plan in words, as a comment, unless it is long."""
    text = words.plan(plan.actions.tolist())
    return f"  # {text}" if len(text) <= _LONGEST else ""


def _path(path: Path) -> str:
    return repr(str(path.resolve()))
