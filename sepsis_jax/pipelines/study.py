"""A study: cohort, audit, world model, policies, language model and all tables, in one folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import jax
import pandas as pd

from sepsis_jax.pipelines import audit, demo
from sepsis_jax.pipelines import world_model as world_model_training
from sepsis_jax.pipelines.agent import AgentOptions, BackendOptions, run_agent
from sepsis_jax.pipelines.audit import AuditConfig
from sepsis_jax.pipelines.episodes import make_synthetic_cohort
from sepsis_jax.pipelines.evaluation import EvaluationOptions, evaluate_all
from sepsis_jax.pipelines.llm.setup import MODEL
from sepsis_jax.pipelines.llm.stages import StagesOptions, run_stages
from sepsis_jax.pipelines.policy_comparison import (
    CLONE,
    POLICIES,
    PPO,
    ComparisonOptions,
    compare_policies,
)
from sepsis_jax.pipelines.study_coverage import coverage_of
from sepsis_jax.pipelines.study_stages import Stage, plan, run_all, stages_done
from sepsis_jax.report.evaluation import TITLES
from sepsis_jax.report.study import write_study
from sepsis_jax.runs import JsonDict, Progress, plain, provenance, silent
from worldmodel.configuration import load_config, require
from worldmodel.episode_files import load_episodes
from worldmodel.errors import InputError
from worldmodel.files import digest_file
from worldmodel.models.training import TrainConfig

ASKED = ("sft", "bc", "rl")  # stages of the language model that are asked in recorded states


@dataclass(frozen=True)
class StudyCohort:
    """Whose records are studied.

    Attributes:
      data: folder of MIMIC-IV (hosp/ and icu/); synthetic patients if not given.
      patients: number of synthetic patients.
      confounding: of the synthetic clinician.
    """

    data: str | None = None
    patients: int = 4000
    confounding: float = 0.0


@dataclass(frozen=True)
class StudyOptions:
    """Settings of a study.

    Attributes:
      cohort: whose records.
      world_model: YAML of `world-model train`; settings that fit the number of stays if not given.
      behavior: the clinician's probabilities, as for `sepsis-jax ope`: "recorded" where they are
        known, as of synthetic patients, else a model to fit, such as "gru".
      policies: what is trained from the records and compared; its `methods` are rows of the table.
      simple: built-in policies that are rows as well.
      language_model: stages of the language model; `without_language_model` leaves them out.
      without_language_model: no language model is trained, and the last table is left out.
      llm: Hugging Face folder to begin with; a tiny random one if not given.
      evaluation: of all tables.
      seeds: the study is run once per seed, and tables have means and spreads over them.
    """

    cohort: StudyCohort = field(default_factory=StudyCohort)
    world_model: str | None = None
    behavior: str = "recorded"
    policies: ComparisonOptions = field(default_factory=ComparisonOptions)
    simple: tuple[str, ...] = ("guideline", "titration", "random")
    language_model: StagesOptions = field(default_factory=StagesOptions)
    without_language_model: bool = False
    llm: str | None = None
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seeds: tuple[int, ...] = (0,)

    def __post_init__(self) -> None:
        require(self, "at least one, each once",
                lambda seeds: seeds and len(set(seeds)) == len(seeds), "seeds")  # fmt: skip
        if self.cohort.data is not None and self.behavior == "recorded":
            raise InputError(
                "behavior: records of a hospital do not hold the clinicians' probabilities; name a "
                "model to fit, such as gru"
            )


def study_plan(out: Path, options: StudyOptions) -> dict[str, dict[str, str]]:
    """By seed, what would become of each stage; see `study_stages.plan`."""
    return {
        f"seed-{seed}": plan(out / f"seed-{seed}", stages_of(out / f"seed-{seed}", options, seed))
        for seed in options.seeds
    }


def run_study(out: Path, options: StudyOptions, progress: Progress = silent) -> pd.DataFrame:
    """Runs what is not done of a study; writes `seed-N/`, tables over the seeds and their page.

    With several seeds and known true values `coverage.csv` has how often intervals hold them.

    Args:
      out: folder of the study, or of an earlier run of it.
      options: settings.
      progress: called with (phase, share done).

    Returns:
      The table of policies over all seeds.

    Raises:
      InputError: as the stages.
    """
    for number, seed in enumerate(options.seeds):
        folder = out / f"seed-{seed}"

        def tell(phase: str, share: float, number: int = number, seed: int = seed) -> None:
            progress(f"seed {seed}, {phase}", (number + share) / len(options.seeds))

        run_all(folder, stages_of(folder, options, seed), tell)
        # Programs of a seed's own shapes would stay in memory to the end, a gigabyte per seed.
        jax.clear_caches()
    of_seeds = {
        name: {seed: pd.read_csv(_table_file(out, seed, name)) for seed in options.seeds}
        for name in TITLES
        if _table_file(out, options.seeds[0], name).exists()
    }
    tables = {name: over_seeds(found) for name, found in of_seeds.items()}
    done = {seed: stages_done(out / f"seed-{seed}") for seed in options.seeds}
    coverage = coverage_of(of_seeds["policies"]) if len(options.seeds) > 1 else None
    write_study(out, tables, done, provenance(settings=plain(options)), coverage)
    return tables["policies"]


def _table_file(out: Path, seed: int, name: str) -> Path:
    return out / f"seed-{seed}" / "evaluation" / f"{name}.csv"


def over_seeds(tables: dict[int, pd.DataFrame]) -> pd.DataFrame:
    """Mean and standard deviation over seeds of every number.

    Args:
      tables: by seed, with the same rows; columns that hold text name a row.

    Returns:
      The text columns, `seeds`, and for each number its name and NAME_sd (NaN with one seed).
    """
    first = next(iter(tables.values()))
    keys = [name for name in ("policy", "stage", "who", "metric") if name in first]
    numbers = [
        name for name in first.columns
        if name not in keys and pd.api.types.is_numeric_dtype(first[name])
        and not pd.api.types.is_bool_dtype(first[name])
        and not name.endswith(("_low", "_high")) and name not in ("low", "high")
    ]  # fmt: skip
    grouped = pd.concat(tables.values()).groupby(keys, sort=False)[numbers]
    spread = grouped.std().add_suffix("_sd")
    table = pd.concat([grouped.size().rename("seeds"), grouped.mean(), spread], axis=1)
    order = ["seeds", *(column for name in numbers for column in (name, f"{name}_sd"))]
    return table[order].reset_index()


def stages_of(out: Path, options: StudyOptions, seed: int) -> list[Stage]:
    """The stages of one seed, in order.

    Args:
      out: folder of the seed.
      options: settings.
      seed: added to every seed of the settings.
    """
    cohort, model, policies = out / "cohort", out / "world_model", out / "policies"
    evaluation = replace(options.evaluation, seed=options.evaluation.seed + seed)
    comparison = replace(options.policies, seed=options.policies.seed + seed)
    audited = AuditConfig(seed=seed)
    config = None if options.world_model is None else Path(options.world_model)
    found = [
        Stage("cohort", {**plain(options.cohort), "seed": seed, "data": _digests(options.cohort)},
              (), partial(_cohort, options.cohort, seed)),
        Stage("world_model", {"config": config and digest_file(config), "seed": seed}, ("cohort",),
              partial(_world_model, cohort, config, seed)),
        Stage("audit", plain(audited), ("cohort", "world_model"),
              lambda to, progress: audit.run_audit(
                  cohort, to, model=model, config=audited, progress=progress)),
        Stage("policies", plain(comparison), ("cohort", "world_model"),
              lambda to, progress: compare_policies(
                  cohort, model, to, comparison, progress=progress)),
    ]  # fmt: skip
    trained = [CLONE, *(name for name in comparison.methods if name != PPO)]
    rows = [f"{name}={policies / POLICIES / name}" for name in trained]
    reads = ["cohort", "world_model", "audit", "policies"]
    if not options.without_language_model:
        more, asked = _of_language_model(out, options, seed)
        found += more
        rows += asked
        reads += [stage.name for stage in more]
    stages = None if options.without_language_model else out / "language_model"
    found.append(
        Stage(
            "evaluation",
            {**plain(evaluation), "behavior": options.behavior, "simple": list(options.simple)},
            tuple(reads),
            lambda to, progress: evaluate_all(
                cohort,
                to,
                [*options.simple, *rows],
                model=model,
                behavior=options.behavior,
                stages=stages,
                audit=out / "audit",
                published=True,
                options=evaluation,
                progress=progress,
            ),
        )
    )
    return found


def _of_language_model(
    out: Path, options: StudyOptions, seed: int
) -> tuple[list[Stage], list[str]]:
    """Its training, every stage's model asked in recorded states, and the rows that these are."""
    cohort, model = out / "cohort", out / "world_model"
    settings = replace(options.language_model, seed=options.language_model.seed + seed)
    llm = None if options.llm is None else Path(options.llm)
    found = [
        Stage(
            "language_model",
            {**plain(settings), "llm": llm and _folder_digest(llm)},
            ("cohort", "world_model"),
            lambda to, progress: run_stages(
                to,
                settings,
                llm=llm,
                model=model,
                episodes=cohort,
                resume=True,
                progress=progress,
            ),
        )
    ]
    runner = settings.rl.runner
    sampling = runner.dialogue.sampling
    if settings.evaluation.temperature is not None:
        sampling = replace(sampling, temperature=settings.evaluation.temperature)
    asked = AgentOptions(
        split=options.evaluation.split, keep_to_record=True, probabilities=True,
        templates=runner.templates, intervals=runner.intervals, concurrency=runner.concurrency,
        prefix_caching=runner.prefix_caching, attempts=1, seed=seed, forecast=runner.forecast,
        dialogue=replace(runner.dialogue, sampling=sampling),
    )  # fmt: skip
    rows = []
    for name in ASKED:
        folder = out / "language_model" / name / MODEL
        found.append(
            Stage(
                f"asked_{name}",
                plain(asked),
                ("cohort", "world_model", "language_model"),
                partial(_ask, asked, folder, model, cohort),
            )
        )
        rows.append(f"{name}={out / f'asked_{name}'}")
    return found, rows


def _ask(
    options: AgentOptions, llm: Path, model: Path, cohort: Path, to: Path, progress: Progress
) -> object:
    # Killed, it begins anew: probabilities are rounded by who is in a batch, and a stay that failed
    # would be tried again.
    shutil.rmtree(to, ignore_errors=True)
    backend = BackendOptions(llm=str(llm))
    return run_agent(to, options, backend, model=model, episodes=cohort, progress=progress)


def _cohort(options: StudyCohort, seed: int, to: Path, progress: Progress) -> object:
    if options.data is None:
        return make_synthetic_cohort(
            to, patients=options.patients, confounding=options.confounding, seed=seed,
            progress=progress,
        )  # fmt: skip
    from sepsis_jax.cohort import CohortOptions, build_cohort

    return build_cohort(options.data, to, replace(CohortOptions(), seed=seed), progress)


def _world_model(
    cohort: Path, config: Path | None, seed: int, to: Path, progress: Progress
) -> object:
    def tell(name: str, epoch: int, epochs: int, metrics: object) -> None:
        progress(f"{name}, epoch {epoch} of {epochs}", epoch / epochs)

    settings = demo.default_config(load_episodes(cohort).num_stays, seed)
    if config is not None:
        settings = load_config(TrainConfig, config)
        settings = replace(settings, seed=settings.seed + seed)
    return world_model_training.train(cohort, to, settings, progress=tell)


def _digests(cohort: StudyCohort) -> JsonDict | None:
    """Name, size and time of every file of a hospital's records, which are too large to read."""
    if cohort.data is None:
        return None
    root = Path(cohort.data)
    files = sorted(path for path in root.rglob("*") if path.is_file()) if root.is_dir() else [root]
    if not root.exists():
        raise InputError(f"{root}: there is no such folder")
    return {
        str(path.relative_to(root.parent)): [path.stat().st_size, path.stat().st_mtime_ns]
        for path in files
    }


def _folder_digest(folder: Path) -> JsonDict:
    return {path.name: digest_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def compare_studies(first: Path, second: Path) -> dict[str, pd.DataFrame]:
    """Numbers of two studies side by side, by table.

    Args:
      first, second: folders of studies.

    Returns:
      By table: its keys, `value`, and `first`, `second` and `difference` where both have it.

    Raises:
      InputError: a folder holds no study.
    """
    found = {}
    for name in TITLES:
        files = [folder / f"{name}.csv" for folder in (first, second)]
        if all(file.exists() for file in files):
            longs = [_long(pd.read_csv(file)) for file in files]
            keys = [column for column in longs[0] if column != "number"]
            both = longs[0].merge(longs[1], on=keys, suffixes=("_first", "_second"))
            both = both.rename(columns={"number_first": "first", "number_second": "second"})
            both["difference"] = both["second"] - both["first"]
            found[name] = both
    if not found:
        raise InputError(f"{first}, {second}: have no table in common; name folders of studies")
    return found


def _long(table: pd.DataFrame) -> pd.DataFrame:
    keys = [name for name in ("policy", "stage", "who", "metric") if name in table]
    kept = [name for name in table if name not in keys and name != "seeds"]
    return table.melt(keys, kept, var_name="value_of", value_name="number")
