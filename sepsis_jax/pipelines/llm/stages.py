"""All stages in a row, and a table with the evaluation of each."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import pandas as pd

from policy.qwen3.config import load_config
from policy.qwen3.weights import load
from policy.registry import CLINICIAN
from policy.serving.backend import Lockstep
from policy.serving.tokens import ChatTokens, TokenBackend
from policy.testing.taught_qwen3 import TinyOptions, make_trainable
from policy.train.data.qa_sampling import Question, QuestionConfig, ask
from policy.train.loop.qa_eval import answer, grade
from policy.train.rl.advantages import AdvantageConfig
from sepsis_jax.pipelines import world_model as world_model_training
from sepsis_jax.pipelines.demo import default_config
from sepsis_jax.pipelines.episodes import make_synthetic_cohort
from sepsis_jax.pipelines.llm.evaluation import (
    OF_STAYS,
    Evaluation,
    evaluate,
    gains,
    interval,
    value_of,
)
from sepsis_jax.pipelines.llm.rl import RLOptions, run_rl
from sepsis_jax.pipelines.llm.setup import (
    METRICS,
    MODEL,
    PLANNER,
    evaluation_runner,
    open_generator,
    open_policy,
    open_runner,
)
from sepsis_jax.pipelines.llm.supervised import BCOptions, SFTOptions, run_bc, run_sft
from sepsis_jax.pipelines.policy_values import TrueWorld
from sepsis_jax.report.figures import reward_figure
from sepsis_jax.runs import JsonDict, Progress, plain, run_folder, silent
from worldmodel.configuration import require
from worldmodel.episode_files import EPISODES_FILE, load_episodes
from worldmodel.errors import InputError
from worldmodel.files import read_json, write_json
from worldmodel.models.checkpoint import PARAMS, load_world_model

T = TypeVar("T")

KIND = "sepsis-jax language model, all stages"
TABLE, CURVES, COMPARATORS = "stages.csv", "curves.png", "comparators.json"
START, SHUFFLED, NO_SIMULATOR = "start", "shuffled", "none"
_STAGES = (START, "sft", "bc", "rl")
_KEPT = ("episodes", "world_model", "start", "sft")  # what a study that fails leaves


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of the evaluation of each stage.

    Attributes:
      patients: number of held-out synthetic patients that the model treats.
      seed: of these patients.
      questions: about the test split, answered without the simulator.
      comparators: policies that treat the same patients under the same random numbers:
        "clinician", the true one of the synthetic world, or as for `open_policy`.
      temperature: at which the evaluated model speaks; that of `rl` if not given. Learning needs
        samples of the whole distribution, treatment does not.
      without: how stages are also evaluated: "shuffled", the simulator answers with the futures of
        other treatments, and "none", there is no simulator.
      without_stages: which stages, of "start", the model that is given, "sft", "bc" and "rl".
      without_patients: number of patients for these and for the stages before "bc", which have not
        learned to treat: the first ones.
    """

    patients: int = 512
    seed: int = 2_000_000
    comparators: tuple[str, ...] = (CLINICIAN, "guideline", "titration", PLANNER)
    without: tuple[str, ...] = (SHUFFLED, NO_SIMULATOR)
    without_stages: tuple[str, ...] = (START, "sft", "bc", "rl")
    without_patients: int = 512
    temperature: float | None = None
    questions: QuestionConfig = field(
        default_factory=lambda: QuestionConfig(
            kinds=("mortality", "vasopressor"), count=500, balanced=False
        )
    )

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda n: n >= 1, "patients", "without_patients")
        if self.temperature is not None:
            require(self, "0 or more", lambda x: x >= 0, "temperature")
        for one in self.without:
            if one not in (SHUFFLED, NO_SIMULATOR):
                raise InputError(f"without: got {one!r}, expected {SHUFFLED} or {NO_SIMULATOR}")
        unknown = set(self.without_stages) - set(_STAGES)
        if unknown:
            raise InputError(
                f"without_stages: got {min(unknown)!r}, expected some of {', '.join(_STAGES)}"
            )


@dataclass(frozen=True)
class StagesOptions:
    """Settings of all stages.

    Attributes:
      patients: number of synthetic stays that the world model is trained on, without episodes.
      tiny: the first model, if none is given.
      sft, bc, rl: the stages; all are evaluated in the runner of `rl`.
      baselines: other kinds of advantages, compared with that of `rl` at equal numbers of stays.
      baseline_num_generations: stays of each patient for the baselines.
      evaluation: settings of the evaluation.
      seed: added to every other seed: another cohort, world model, language model, data and
        patients.
    """

    RENAMED: ClassVar[dict[str, str]] = {
        "exam": "evaluation",
        "rivals": "baselines",
        "rival_replicas": "baseline_num_generations",
    }

    patients: int = 4000
    tiny: TinyOptions = field(default_factory=TinyOptions)
    sft: SFTOptions = field(default_factory=SFTOptions)
    bc: BCOptions = field(default_factory=BCOptions)
    rl: RLOptions = field(default_factory=RLOptions)
    baselines: tuple[str, ...] = ()
    baseline_num_generations: int = 8
    evaluation: EvaluationOptions = field(default_factory=EvaluationOptions)
    seed: int = 0

    def seeded(self) -> StagesOptions:
        """The settings with `seed` added to those of all parts."""

        def moved(part: T, name: str = "seed", **more: object) -> T:
            return replace(part, **{name: getattr(part, name) + self.seed}, **more)  # type: ignore[type-var]

        rl = moved(self.rl, runner=moved(self.rl.runner))
        return replace(
            self,
            tiny=moved(self.tiny),
            sft=moved(self.sft),
            bc=moved(self.bc, runner=moved(self.bc.runner)),
            rl=moved(rl, "eval_seed"),
            evaluation=moved(self.evaluation),
        )


def run_stages(
    out: Path,
    options: StagesOptions,
    *,
    llm: Path | None = None,
    model: Path | None = None,
    episodes: Path | None = None,
    resume: bool = False,
    progress: Progress = silent,
) -> pd.DataFrame:
    """Runs and evaluates all stages; writes a folder per stage, `stages.csv` and `curves.png`.

    Args:
      out: folder to write, or to go on with.
      options: settings.
      llm: Hugging Face folder of a chat model to begin with, which is evaluated first as "start";
        a tiny random Qwen3, which is not, if not given.
      model: world model; one is trained on the episodes if not given.
      episodes: recorded stays; synthetic ones if not given.
      resume: go on with an earlier run of the same request.
      progress: called with each phase.

    Returns:
      One row per stage, with its paired gain over the stage before.

    Raises:
      InputError: as the stages.
    """
    if llm is not None:
        load_config(llm)
    if model is not None:
        load_world_model(model)
    if episodes is not None:
        load_episodes(episodes)
    inputs = {"llm": llm, "model": model, "episodes": episodes}
    request = {
        "options": plain(options),
        **{name: path and str(path.resolve()) for name, path in inputs.items()},
    }
    with run_folder(out, KIND, request, resume=resume, keeps=_KEPT):
        return _run_stages(out, options.seeded(), llm, model, episodes, progress)


def _run_stages(
    out: Path,
    options: StagesOptions,
    llm: Path | None,
    model: Path | None,
    episodes: Path | None,
    progress: Progress,
) -> pd.DataFrame:
    """`run_stages` in a folder that is its own."""
    baselines = [f"rl_{kind}" for kind in options.baselines]
    part = _parts(progress, baselines)
    episodes = episodes or _episodes(out / "episodes", options, part["records"])
    model = model or _world_model(out / "world_model", episodes, options, part["world model"])
    start = llm or _tiny(out / START, episodes, model, options, part[START])

    runs: dict[str, tuple[Path, Callable[[Path], object]]] = {}
    sft, bc = out / "sft", out / "bc"
    common: JsonDict = {"episodes": episodes, "resume": True}

    def rl(advantages: AdvantageConfig, num_generations: int) -> Callable[[Path], object]:
        batch = options.rl.agentic.patients * options.rl.agentic.num_generations
        agentic = replace(
            options.rl.agentic,
            advantages=advantages,
            patients=batch // num_generations,
            num_generations=num_generations,
        )
        chosen = replace(options.rl, agentic=agentic)
        return lambda to: run_rl(
            to, chosen, llm=bc / MODEL, model=model, progress=part[to.name], **common
        )

    runs["sft"] = (
        sft,
        lambda to: run_sft(to, options.sft, llm=start, progress=part["sft"], **common),
    )
    runs["bc"] = (
        bc,
        lambda to: run_bc(
            to, options.bc, llm=sft / MODEL, model=model, progress=part["bc"],
            **common,
        ),
    )  # fmt: skip
    main = options.rl.agentic.advantages
    runs["rl"] = (out / "rl", rl(main, options.rl.agentic.num_generations))
    for name, kind in zip(baselines, options.baselines, strict=True):
        runs[name] = (out / name, rl(replace(main, kind=kind), options.baseline_num_generations))
    comparators = _comparators(out, options, model, episodes, part["comparators"])
    rows: list[JsonDict] = [{"stage": name, **value_of(one)} for name, one in comparators.items()]
    evaluations: dict[str, dict[str, np.ndarray]] = {}

    def add(name: str, before: str, llm: Path, simulator: str = "") -> None:
        folder = out / name
        tell = part[_evaluation_of(name)]
        found = _evaluate_stage(folder, llm, name, options, model, episodes, tell, simulator)
        own = {one: np.array(found.pop(one)) for one in OF_STAYS}
        if simulator:
            name, before = f"{name}, simulator {simulator}", name
        evaluations[name] = own
        row = {"stage": name, **found}
        count = len(own["returns"])
        if before in evaluations:
            earlier = evaluations[before]
            both = slice(min(count, len(earlier["returns"])))
            row |= gains(*({key: x[both] for key, x in one.items()} for one in (earlier, own)))
        for other, returns in comparators.items():
            row |= interval(f"less_{other}", own["returns"] - returns[:count])
        rows.append(row)
        pd.DataFrame(rows).to_csv(out / TABLE, index=False)

    def evaluate_all(name: str, before: str, llm: Path) -> None:
        add(name, before, llm)
        for simulator in options.evaluation.without:
            if name in options.evaluation.without_stages:
                add(name, before, llm, simulator)

    if llm is not None:
        evaluate_all(START, "", llm)
    for name, (folder, run) in runs.items():
        if not (folder / MODEL / "config.json").exists():
            run(folder)
        evaluate_all(name, {"sft": START, "bc": "sft"}.get(name, "bc"), folder / MODEL)
    table = pd.DataFrame(rows)
    courses = {
        name: pd.DataFrame(_lines(folder / METRICS / "metrics.jsonl"))
        for name, (folder, _) in runs.items()
        if name.startswith("rl")
    }
    before = float(table.loc[table["stage"] == "bc", "value"].iloc[0])
    reward_figure(courses, before, out / CURVES)
    return table


def _comparators(
    out: Path, options: StagesOptions, model: Path, episodes: Path, progress: Progress
) -> dict[str, np.ndarray]:
    """[N] true total reward of each patient by comparator, saved in `out`."""
    file = out / COMPARATORS
    found: dict[str, list[float]] = read_json(file) if file.exists() else {}
    config = options.evaluation
    world = TrueWorld(
        config.patients, config.seed, confounding=0.0, max_steps=options.rl.runner.max_steps
    )
    for number, name in enumerate(config.comparators):
        if name not in found:
            progress(name, number / len(config.comparators))
            policy = None if name == CLINICIAN else open_policy(name, episodes, model)
            found[name] = world.outcome(policy).total.tolist()
            write_json(file, found)
    return {name: np.array(found[name]) for name in config.comparators}


def _evaluate_stage(
    folder: Path,
    llm: Path,
    name: str,
    options: StagesOptions,
    model: Path,
    episodes: Path,
    progress: Progress,
    simulator: str,
) -> JsonDict:
    """Evaluation of a stage's model, saved in the stage's folder.

    Questions are answered without a simulator, so once: with another one, or none, the answers are
    those of the evaluation before.
    """
    plain = folder / "evaluation.json"
    file = folder / f"evaluation_{simulator}.json" if simulator else plain
    if not file.exists():
        progress("with the simulator" if not simulator else f"simulator {simulator}", 0.0)
        settings, patients = options.rl.runner, options.evaluation.patients
        if simulator or name in (START, "sft"):
            patients = min(patients, options.evaluation.without_patients)
        if options.evaluation.temperature is not None:
            sampling = replace(
                settings.dialogue.sampling, temperature=options.evaluation.temperature
            )
            settings = replace(settings, dialogue=replace(settings.dialogue, sampling=sampling))
        if simulator == SHUFFLED:
            settings = replace(settings, forecast=replace(settings.forecast, shuffled=True))
        runner = open_runner(settings, model, episodes)
        evaluator = evaluation_runner(runner, settings, seed=options.evaluation.seed)
        if simulator == NO_SIMULATOR:
            evaluator = replace(evaluator, forecaster=None)
        questions: list[Question] = []
        if not simulator:
            recorded = load_episodes(episodes).of_split("test")
            config = options.evaluation
            questions = ask(recorded, config.questions, seed=config.seed)
        lockstep = Lockstep()
        generator = open_generator(load(llm), llm, options.rl.runner, lockstep)
        tokens = ChatTokens.load(llm)
        backend = TokenBackend(generator, tokens)

        async def run() -> tuple[Evaluation, list[np.ndarray]]:
            treated = await evaluate(evaluator, backend, patients, lockstep=lockstep)
            answers = await answer(generator, tokens, questions)
            await backend.close()
            return treated, answers

        treated, answers = asyncio.run(run())
        found: JsonDict = treated.figures()
        found |= {name: getattr(treated, name).tolist() for name in OF_STAYS}
        if simulator:
            found = read_json(plain) | found
        else:
            found |= _grades(questions, answers)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(file, {key: None if x != x else x for key, x in found.items()})
    result: JsonDict = json.loads(file.read_text())
    return result


def _grades(questions: Sequence[Question], answers: Sequence[np.ndarray]) -> JsonDict:
    """AUROC and AUPRC by kind of question, with 95% intervals."""
    found: JsonDict = {}
    for kind, of_kind in grade(questions, answers).items():
        for metric in ("auroc", "auprc"):
            estimate = getattr(of_kind, metric)
            found |= {
                f"{kind}_{metric}": estimate.value,
                f"{kind}_{metric}_low": estimate.low,
                f"{kind}_{metric}_high": estimate.high,
            }
    return found


def _episodes(folder: Path, options: StagesOptions, progress: Progress) -> Path:
    if not (folder / EPISODES_FILE).exists():
        make_synthetic_cohort(
            folder, patients=options.patients, seed=options.seed, progress=progress
        )
    return folder


def _world_model(folder: Path, episodes: Path, options: StagesOptions, progress: Progress) -> Path:
    if not (folder / PARAMS).exists():

        def tell(name: str, epoch: int, epochs: int, metrics: object) -> None:
            progress(f"{name}, epoch {epoch} of {epochs}", epoch / epochs)

        config = default_config(load_episodes(episodes).num_stays, seed=options.seed)
        world_model_training.train(episodes, folder, config, progress=tell)
    return folder


def _tiny(
    folder: Path, episodes: Path, model: Path, options: StagesOptions, progress: Progress
) -> Path:
    if not (folder / "config.json").exists():
        progress("made", 0.0)
        runner = open_runner(options.bc.runner, model, episodes)
        demonstrator = open_policy(options.bc.demonstrator, episodes, model, options.bc.planner)
        stays = runner.demonstrate(demonstrator, range(32), options.bc.demonstration)
        recorded = load_episodes(episodes).of_split("train")
        few = replace(options.sft.questions, count=min(40, options.sft.questions.count))
        make_trainable(folder, options.tiny, stays, ask(recorded, few, seed=0))
    return folder


_MINUTES = {
    "records": 1, "world model": 4, START: 1, "comparators": 2, "sft": 2, "bc": 18, "rl": 9,
}  # fmt: skip
_OF_EVALUATION = 2  # minutes


def _evaluation_of(name: str) -> str:
    return f"{name}, evaluation"


def _parts(progress: Progress, baselines: Sequence[str]) -> dict[str, Progress]:
    """By part of the work, its progress as a share of the whole; minutes are those of a tiny model.

    Args:
      progress: of the whole.
      baselines: further runs of stage III.
    """
    minutes: dict[str, float] = {}
    for name in (*_MINUTES, *baselines):
        minutes[name] = _MINUTES.get(name, _MINUTES["rl"])
        if name not in ("records", "world model", "comparators"):
            minutes[_evaluation_of(name)] = _OF_EVALUATION
    whole, begun = sum(minutes.values()), 0.0
    found: dict[str, Progress] = {}
    for name, own in minutes.items():
        found[name] = partial(_of_part, progress, name, begun, own, whole)
        begun += own
    return found


def _of_part(
    progress: Progress,
    name: str,
    begun: float,
    own: float,
    whole: float,
    phase: str,
    share: float,
) -> None:
    progress(f"{name}: {phase}", (begun + own * share) / whole)


def _lines(path: Path) -> Sequence[JsonDict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
