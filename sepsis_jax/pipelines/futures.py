"""Truth benchmark of futures: what a world model says of treatments, beside what they truly do.

Fresh patients of the synthetic world are treated by the clinician up to a row; from there each of
the 25 treatments is held for some hours, and the clinician goes on. The world plays that out for
the same patients; the model predicts it from the record.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.preprocessing import StandardScaler

from sepsis_jax.ope.simulated import SUPPORTED
from sepsis_jax.pipelines.policy_values import TrueWorld, rank_correlation
from sepsis_jax.report.figures import effects_figure
from sepsis_jax.runs import Progress, provenance, silent
from worldmodel import schema
from worldmodel.clinical.reward import episode_rewards
from worldmodel.configuration import require
from worldmodel.episode_files import load_episodes
from worldmodel.episodes import Episodes
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, check_replaceable, write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.recurrent import CODES
from worldmodel.models.world_model import WorldModel
from worldmodel.resources import in_blocks
from worldmodel.simulate.history import start_history
from worldmodel.simulate.rollout import require_rollouts, rollout
from worldmodel.simulate.statistics import disagreement, plan_support
from worldmodel.synthetic import Config, generate
from worldmodel.synthetic.generate import Truth, require_patients
from worldmodel.synthetic.simulate import FOLLOW_POLICY
from worldmodel.synthetic.truth import counterfactual

MARKER = "futures.csv"
VALUES = ("meanbp", "lactate", "output_4hourly")
SHOCK = 60.0  # mmHg: patients with a lower MAP are reported apart
LARGE_ERROR = 0.1  # of mortality
_BLOCK = 128  # patients per call
_SAME = np.arange(schema.NUM_ACTIONS)


@dataclass(frozen=True)
class FuturesConfig:
    """What is asked.

    Attributes:
      patients: fresh synthetic patients.
      step: row from which a treatment is held.
      held: steps for which it is held; the clinician goes on.
      samples: simulated futures per patient and plan, and ensemble member.
      seed: of the patients' world; another than the training data's.
      confounding: levels of treatment per SD of what is not recorded; `ClinicianParams`.
    """

    patients: int = 1000
    step: int = 2
    held: int = 6
    samples: int = 2
    seed: int = 1000
    confounding: float = 0.0

    def __post_init__(self) -> None:
        require(self, "at least 1", lambda count: count >= 1, "patients", "held", "samples")
        require(self, "0 or more", lambda value: 0 <= value < math.inf, "step", "confounding")
        last = Config.horizon - 1
        if self.step + self.held > last:
            raise InputError(
                f"step, held: got {self.step} and {self.held}, expected at most {last} together: "
                f"stays of the synthetic world have {Config.horizon} rows"
            )


class Futures(NamedTuple):
    """Results of P patients under K plans, [P, K]; values are those at the end of the plan."""

    mortality: np.ndarray  # death within 90 days: 0 or 1 in truth, a probability in the model
    reward: np.ndarray  # total reward from the start row on
    alive: np.ndarray  # share of the stay's futures that reach the end of the plan
    values: dict[str, np.ndarray]  # by feature, and sofa; times `alive`
    support: np.ndarray  # least probability of a step of the plan under the clinician
    disagreement: np.ndarray  # SD of the members' mortality; NaN for one member


def true_futures(
    episodes: Episodes, truth: Truth, config: FuturesConfig
) -> tuple[Futures, np.ndarray, np.ndarray]:
    """The world's own answer for the patients of `episodes`, all of which reach the row.

    Returns:
      The futures of the 25 plans, and mortality and total reward [P] under the clinician.
    """
    given = np.asarray(episodes.action)
    until = config.step + config.held
    outcomes, values = [], []
    for action in (*range(schema.NUM_ACTIONS), FOLLOW_POLICY):
        plans = np.full((episodes.num_stays, truth.config.horizon), FOLLOW_POLICY, np.int32)
        plans[:, : config.step] = given[:, : config.step]
        plans[:, config.step : until] = action
        futures, behind = counterfactual(truth, plans)
        there = np.asarray(futures.length) > until
        rows = np.asarray(futures.dynamic)[:, until]
        reward = np.asarray(behind.reward)[:, config.step :].sum(1)
        died = np.asarray(futures.died_90d)
        outcomes.append(np.stack([died, reward, there]).astype(np.float64))
        seen = [rows[:, schema.INDEX[name]] for name in VALUES]
        values.append(there * np.stack([*seen, np.asarray(futures.sofa)[:, until]]))
    mortality, reward, alive = np.stack(outcomes[:-1], axis=-1)
    named = dict(zip((*VALUES, "sofa"), np.stack(values[:-1], axis=-1), strict=True))
    unknown = np.full(mortality.shape, np.nan)
    futures_found = Futures(mortality, reward, alive, named, unknown, unknown)
    return futures_found, outcomes[-1][0], outcomes[-1][1]


def learned_futures(world_model: WorldModel, episodes: Episodes, config: FuturesConfig) -> Futures:
    """The model's answer; models that read windows end every future with the plan."""
    members = world_model.num_members
    plans = np.repeat(_SAME[:, None], config.held, axis=1)
    key = jax.random.key(config.seed)

    def of_patients(rows: np.ndarray) -> tuple[np.ndarray, ...]:
        start = start_history(world_model, episodes.select(rows), config.step)
        found = rollout(
            world_model, key, start, plans, samples=config.samples * members, features=VALUES
        )
        mortality = np.asarray(found.mortality, np.float64)
        alive = (
            np.ones(mortality.shape) if found.alive is None else np.asarray(found.alive[..., -1])
        )
        support = np.full(alive.shape[:2], np.nan)
        if found.support is not None:
            support = plan_support(np.asarray(found.support))
        values = [np.asarray(found.feature(name)[..., -1]) for name in VALUES]
        values.append(np.asarray(found.sofa[..., -1]))
        return (
            mortality.mean(-1),
            np.asarray(found.total_reward, np.float64).mean(-1),
            alive.mean(-1),
            support,
            disagreement(mortality, members),
            *((value * alive).mean(-1) for value in values),
        )

    count = episodes.num_stays
    mortality, reward, alive, support, between, *values = in_blocks(
        of_patients, count, min(_BLOCK, count)
    )
    named = dict(zip((*VALUES, "sofa"), values, strict=True))
    return Futures(mortality, reward, alive, named, support, between)


def linear_futures(records: Episodes, episodes: Episodes, config: FuturesConfig) -> Futures:
    """What regressions on recorded stays say: a baseline that adjusts for the row and nothing else.

    Logistic regression of death, ridge regressions of the rewards to come and of the values at
    the end of the plan, on the row, age, sex, Charlson index, the treatment before, and the mean
    thermometer code of the treatments of the plan's steps.

    Args:
      records: stays to fit on.
      episodes: P stays to answer for, all of which reach the row.
      config: what is asked.
    """
    until = config.step + config.held
    fit_on = records.select(np.asarray(records.length) > config.step)
    there = np.asarray(fit_on.length) > until
    scaler = StandardScaler()
    rows = scaler.fit_transform(_linear_rows(fit_on, config.step))
    given = np.asarray(fit_on.action)[:, config.step : until]
    steps = np.asarray(fit_on.valid)[:, config.step : until, None]
    code = (CODES[given] * steps).sum(1) / steps.sum(1)
    inputs = np.concatenate([rows, code], axis=1)
    asked = scaler.transform(_linear_rows(episodes, config.step))
    plans = np.concatenate(
        [np.repeat(asked, len(CODES), 0), np.tile(CODES, (len(asked), 1))], axis=1
    )
    shape = (len(asked), len(CODES))

    def ridge(target: np.ndarray, use: np.ndarray) -> np.ndarray:
        fitted = Ridge(alpha=1.0).fit(inputs[use], target[use])
        return np.asarray(fitted.predict(plans)).reshape(shape)

    everyone = np.ones(len(there), bool)
    died = LogisticRegression(max_iter=1000).fit(inputs, np.asarray(fit_on.died_90d))
    rewards = np.asarray(episode_rewards(fit_on), np.float64)[:, config.step :].sum(1)
    dynamic = np.asarray(fit_on.dynamic)[:, min(until, fit_on.num_steps - 1)]
    values = {name: ridge(dynamic[:, schema.INDEX[name]], there) for name in VALUES}
    values["sofa"] = ridge(np.asarray(fit_on.sofa)[:, min(until, fit_on.num_steps - 1)], there)
    return Futures(
        mortality=died.predict_proba(plans)[:, 1].reshape(shape),
        reward=ridge(rewards, everyone),
        alive=np.ones(shape),
        values=values,
        support=np.full(shape, np.nan),
        disagreement=np.full(shape, np.nan),
    )


def _linear_rows(episodes: Episodes, step: int) -> np.ndarray:
    """[N, 44] the row, urine as its logarithm, static features, levels of the treatment before."""
    row = np.array(episodes.dynamic[:, step], np.float64)
    row[:, schema.URINE] = np.log1p(row[:, schema.URINE])
    before = np.zeros((len(row), 2))
    if step:
        action = np.asarray(episodes.action)[:, step - 1]
        before = np.stack(schema.action_levels(action), axis=1)
    return np.concatenate([row, np.asarray(episodes.static), before], axis=1)


def compare_futures(
    model: str | Path,
    out: str | Path,
    config: FuturesConfig | None = None,
    *,
    records: str | Path | None = None,
    progress: Progress = silent,
) -> dict[str, object]:
    """Compares a world model's futures with the truth; writes futures.csv, .png, metrics.json.

    Args:
      model: folder of a world model trained in the synthetic world.
      out: folder to write.
      config: what is asked.
      records: folder of episodes on whose training split linear baselines are fitted.
      progress: called with (phase, share done).

    Raises:
      InputError: no patient reaches the row.
    """
    config = config or FuturesConfig()
    check_replaceable(Path(out), MARKER)
    world_model = load_world_model(model)
    recorded = None if records is None else load_episodes(records).of_split("train")
    require_patients(config.patients)
    require_rollouts(
        config.samples * world_model.num_members,
        patients=min(_BLOCK, config.patients),
        plans=schema.NUM_ACTIONS,
        horizon=config.held,
        features=len(VALUES),
    )
    progress("simulating patients", 0.0)
    world = TrueWorld(config.patients, config.seed, config.confounding)
    episodes, truth = generate(
        jax.random.key(config.seed), config.patients, keep_latent=False, params=world.params()
    )
    reached = np.flatnonzero(np.asarray(episodes.length) > config.step)
    if not len(reached):
        raise InputError(f"step: none of {config.patients} patients reaches row {config.step}")
    episodes = episodes.select(reached)
    truth = replace(truth, patient=truth.patient[reached])
    progress("true futures", 0.1)
    true, died, total = true_futures(episodes, truth, config)
    progress("learned futures", 0.5)
    learned = learned_futures(world_model, episodes, config)
    shock = np.asarray(episodes.dynamic)[:, config.step, schema.INDEX["meanbp"]] < SHOCK
    table = futures_table(true, learned)
    metrics = agreement(true, learned, shock) | choice(true, learned, died, total)
    metrics |= {
        "held_hours": config.held * world_model.step_hours,
        "patients": len(reached),
        "in_shock": int(shock.sum()),
    }
    if recorded is not None:
        progress("linear baselines", 0.95)
        fitted = linear_futures(recorded, episodes, config)
        baseline = agreement(true, fitted, shock)
        metrics |= {
            f"linear_{name}": row for name, row in baseline.items() if isinstance(row, dict)
        }
    with atomic_folder(Path(out), marker=MARKER) as folder:
        table.to_csv(folder / "futures.csv", index=False)
        write_json(folder / "metrics.json", metrics)
        write_json(folder / "manifest.json", provenance(model=str(model), **asdict(config)))
        effects_figure(table, folder / "futures.png")
    progress("done", 1.0)
    return metrics


def futures_table(true: Futures, learned: Futures) -> pd.DataFrame:
    """One row per plan: mortality, reward and effects on values, true and learned."""
    table = pd.DataFrame({"plan": [schema.action_name(int(a)) for a in _SAME]})
    table["vasopressor"], table["fluid"] = schema.action_levels(_SAME)
    for name in ("mortality", "reward"):
        table[f"{name}_true"] = getattr(true, name).mean(0)
        table[f"{name}_learned"] = getattr(learned, name).mean(0)
    for name in true.values:
        for source, futures in (("true", true), ("learned", learned)):
            mean = _mean_value(futures, name)
            table[f"{name}_{source}"] = mean - mean[0]
    table["support"] = learned.support.mean(0)
    table["supported"] = ~(table["support"] < SUPPORTED)  # NaN counts as supported
    table["disagreement"] = learned.disagreement.mean(0)
    return table


def _mean_value(futures: Futures, name: str) -> np.ndarray:
    """[K] mean over those still there at the end of the plan."""
    result: np.ndarray = futures.values[name].sum(0) / futures.alive.sum(0)
    return result


def agreement(true: Futures, learned: Futures, shock: np.ndarray) -> dict[str, object]:
    """Ranks and errors over the 25 plans, over those with support, and of patients in shock."""
    supported = ~(learned.support.mean(0) < SUPPORTED)

    def against(of: np.ndarray, plans: np.ndarray, name: str) -> dict[str, float | None]:
        if not of.any() or not plans.any():
            return {"spearman": None, "error": None}
        one, other = (getattr(futures, name)[of][:, plans].mean(0) for futures in (true, learned))
        return {
            "spearman": rank_correlation(one, other),
            "error": float(np.abs(one - other).mean()),
        }

    everyone, every = np.ones(len(shock), bool), np.ones(schema.NUM_ACTIONS, bool)
    metrics: dict[str, object] = {
        "mortality": against(everyone, every, "mortality"),
        "mortality_supported": against(everyone, supported, "mortality"),
        "mortality_unsupported": against(everyone, ~supported, "mortality"),
        "mortality_shock": against(shock, every, "mortality"),
        "mortality_shock_ceiling": _ceiling(true.mortality[shock]),
        "reward": against(everyone, every, "reward"),
        "supported_plans": int(supported.sum()),
        "support_finds_errors": _finds_errors(true, learned, -learned.support),
        "disagreement_finds_errors": _finds_errors(true, learned, learned.disagreement),
        "nothing_rated_safest": bool(learned.mortality.mean(0).argmin() == 0),
        "nothing_truly_safest": bool(true.mortality.mean(0).argmin() == 0),
    }
    for name in true.values:
        one, other = (_mean_value(futures, name) for futures in (true, learned))
        metrics[name] = {
            "spearman": rank_correlation(one - one[0], other - other[0]),
            "error": float(np.abs((one - one[0]) - (other - other[0])).mean()),
        }
    return metrics


def _finds_errors(true: Futures, learned: Futures, warning: np.ndarray) -> float | None:
    """AUROC of a warning [P, K], averaged over patients, for plans whose mortality is wrong.

    None where no plan, or every plan, is wrong by more than `LARGE_ERROR`.
    """
    wrong = np.abs(true.mortality.mean(0) - learned.mortality.mean(0)) > LARGE_ERROR
    signal = warning.mean(0)
    if not 0 < wrong.sum() < len(wrong) or not np.isfinite(signal).all():
        return None
    return float(roc_auc_score(wrong, signal))


def _ceiling(mortality: np.ndarray) -> float | None:
    """Rank correlation of the true plans between two halves of the patients; None for too few."""
    if len(mortality) < 2:
        return None
    return rank_correlation(mortality[::2].mean(0), mortality[1::2].mean(0))


def choice(
    true: Futures, learned: Futures, died: np.ndarray, total: np.ndarray
) -> dict[str, dict[str, float]]:
    """True reward and mortality of holding, per patient, the plan that the model rates best.

    Beside the clinician, and beside the plan that is best on average in truth.
    """
    allowed = ~(learned.support < SUPPORTED)
    rated = np.where(allowed, learned.reward, -np.inf)
    best = np.where(allowed.any(1), rated.argmax(1), learned.reward.argmax(1))
    rows = np.arange(len(best))
    constant = int(true.reward.mean(0).argmax())
    return {
        "chosen_by_model": {
            "reward": float(true.reward[rows, best].mean()),
            "mortality": float(true.mortality[rows, best].mean()),
        },
        "clinician": {"reward": float(total.mean()), "mortality": float(died.mean())},
        "best_constant_plan": {
            "reward": float(true.reward[:, constant].mean()),
            "mortality": float(true.mortality[:, constant].mean()),
        },
    }


def mortality_rows(folder: str | Path) -> list[dict[str, float]]:
    """Rows of a written futures.csv: levels, true and learned mortality, supported; 25 plans."""
    table = pd.read_csv(Path(folder) / "futures.csv")
    columns = ["vasopressor", "fluid", "mortality_true", "mortality_learned", "supported"]
    rows: list[dict[str, float]] = table[columns].to_dict("records")
    return rows
