"""What each quirk of the published inference does to value and guideline adherence.

    python scripts/agent_quirks.py --episodes runs/synthetic --model runs/reference \
        --out benchmarks/agent_quirks.json

A scripted agent treats the recorded stays of the test split: it simulates the three treatments that
a clone of the clinicians finds likeliest and prescribes the one whose answer promises the highest
reward for the step. Each quirk is switched on alone, then all of them, and compared with none over
the same stays; intervals are bootstraps over stays. `--model` is a world model of fixed windows, as
configs/world_model_reference.yaml trains.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from policy.agent.dialogue import COMPLETED, DialogueConfig, Stay, treat
from policy.agent.env_pool import EnvPool, reset_batch
from policy.agent.forecast import ForecastConfig
from policy.agent.prompts import Prompts
from policy.agent.reference import Quirks, learned_env, make_forecaster
from policy.agent.scripted import Script, ScriptedBackend, prescribe, simulate, was_simulated
from policy.agent.tools import MAX_OPTIONS
from policy.agent.transcript import g1, g2
from policy.base import Policy
from policy.serving.backend import Message, Reply
from policy.train.episodes import probabilities
from sepsis_jax.pipelines.llm.setup import open_policy
from sepsis_jax.runs import provenance
from worldmodel.clinical.reward import step_reward
from worldmodel.episode_files import load_episodes_for
from worldmodel.episodes import Episodes
from worldmodel.files import write_json
from worldmodel.models.checkpoint import load_world_model
from worldmodel.models.world_model import WorldModel
from worldmodel.synthetic import patient_keys

SWITCHES = ("recorded_forecast", "lagged_actions", "single_future", "published_scores",
            "threshold_outcome")  # fmt: skip
NONE, ALL = "none", "reference"
STATE = '{"sofa": {{ chart.sofa[-1] }}, "lactate": {{ chart.values("lactate")[-1] }}}'
TEMPLATES = {
    "first": STATE,
    "prescription": "{% if done %}{}{% else %}" + STATE + "{% endif %}",
    "simulation": "[{% for o in options %}[{{ o.sofa }}, {{ o.values['lactate'] }}]"
    "{{ ', ' if not loop.last }}{% endfor %}]",
    "error": "{{ message }}",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--episodes", type=Path, required=True)
    parser.add_argument("--model", type=Path, required=True, help="world model of fixed windows")
    parser.add_argument("--out", type=Path, required=True, help="JSON file for the result")
    parser.add_argument("--patients", type=int, default=500, help="of the test split, at most")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the noise")
    parser.add_argument("--samples", type=int, default=60, help="futures per treatment")
    arguments = parser.parse_args()

    variants = {
        NONE: Quirks().of_mode("corrected"),
        **{name: Quirks(**{name: True}).of_mode("corrected") for name in SWITCHES},
        ALL: Quirks().of_mode("reference"),
    }
    world_model = load_world_model(arguments.model)
    episodes = load_episodes_for(world_model, arguments.episodes).of_split("test")
    episodes = episodes.select(slice(arguments.patients))
    clone = open_policy("clinician", arguments.episodes)
    played = {}
    for name, quirks in variants.items():
        played[name] = run(world_model, episodes, clone, quirks, arguments)
        print(f"{name}: mean total reward {played[name][..., 0].mean():.2f}", flush=True)
    rows = {name: compare(played[NONE], played[name]) for name in variants}
    for name, row in rows.items():
        print(f"{name:18s} " + "  ".join(f"{key} {text(value)}" for key, value in row.items()))
    write_json(
        arguments.out,
        provenance(
            episodes=str(arguments.episodes), model=str(arguments.model),
            patients=played[NONE].shape[1], seeds=arguments.seeds, samples=arguments.samples,
            rows=rows,
        ),
    )  # fmt: skip


def text(value: Sequence[float]) -> str:
    """A figure with its interval."""
    middle, low, high = value
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def greedy(pool: EnvPool, slot: int) -> Script:
    """Simulates what a clinician is likeliest to give, prescribes what promises most."""
    options: list[int] = []
    state = {"sofa": 0.0, "lactate": 0.0}

    def script(messages: Sequence[Message], seed: int) -> Reply:
        told = json.loads(messages[-1]["content"])
        if was_simulated(messages):
            sofa, lactate = jnp.asarray(told).T
            before = {name: jnp.full_like(sofa, value) for name, value in state.items()}
            promised = step_reward(before["sofa"], sofa, before["lactate"], lactate)
            return prescribe(messages, options[int(np.argmax(promised))])
        state.update(told)
        likely = pool.values(slot)
        assert likely is not None
        options[:] = np.argsort(likely)[::-1][:MAX_OPTIONS].tolist()
        return simulate(messages, options)

    return script


def run(
    world_model: WorldModel,
    episodes: Episodes,
    clone: Policy,
    quirks: Quirks,
    arguments: argparse.Namespace,
) -> np.ndarray:
    """[seeds, stays, 5] total reward, death, prescriptions, violations, and whether any differed.

    The last is whether the agent ever gave other than what was recorded.
    """
    env = learned_env(world_model, episodes, quirks, follow_record=True)
    stays = np.arange(episodes.num_stays, dtype=np.int32)
    recorded = np.asarray(episodes.action)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, template in TEMPLATES.items():
            (Path(folder) / f"{name}.md.j2").write_text(template)
        prompts = Prompts(folder)
        for seed in arguments.seeds:
            key = jax.random.key(seed)
            config = quirks.forecast(ForecastConfig(samples=arguments.samples))
            batch = reset_batch(env, patient_keys(key, stays), stays, stays=stays)
            pool = EnvPool(
                env, batch, make_forecaster(quirks, world_model, key, config),
                capacity=256, state_scorer=probabilities(clone, key),
            )  # fmt: skip
            done = asyncio.run(treat_each(pool, prompts, quirks, seed))
            pool.close()
            found.append([figures(stay, recorded[stay.patient]) for stay in done])
    return np.array(found, np.float64)


async def treat_each(pool: EnvPool, prompts: Prompts, quirks: Quirks, seed: int) -> list[Stay]:
    """Dialogues with all patients of a pool, by slot."""
    config = quirks.dialogue(DialogueConfig())

    async def stay(slot: int) -> Stay:
        backend = ScriptedBackend(greedy(pool, slot))
        return await treat(slot, slot, backend, pool, prompts, config, seed=seed)

    found = await asyncio.gather(*map(stay, range(pool.size)))
    failed = [one.detail for one in found if one.status != COMPLETED]
    if failed:
        raise SystemExit(f"a stay failed: {failed[0]}")
    return list(found)


def figures(stay: Stay, recorded: np.ndarray) -> tuple[float, float, int, int, bool]:
    """What is counted of a stay; see `run`."""
    given = [decision.action for decision in stay.decisions]
    broken = sum(g1(vars(one)) + g2(vars(one)) for one in stay.decisions)
    differs = given != recorded[: len(given)].tolist()
    return stay.total_reward, float(stay.mortality or 0.0), len(given), broken, differs


def compare(base: np.ndarray, other: np.ndarray, resamples: int = 2_000) -> dict[str, list[float]]:
    """Figures of one variant and their differences from the base, each with a 95% interval.

    Resamples stays, with all their seeds.

    Args:
      base, other: [seeds, stays, 5] as `run` gives them.
      resamples: of the stays.
    """
    rng = np.random.default_rng(0)
    picks = rng.integers(0, base.shape[1], (resamples, base.shape[1]))
    measures: dict[str, Callable[[np.ndarray], float]] = {
        "reward": lambda x: float(x[..., 0].mean()),
        "mortality": lambda x: float(100.0 * x[..., 1].mean()),
        "adherence": lambda x: float(100.0 * (1.0 - x[..., 3].sum() / x[..., 2].sum())),
        "record": lambda x: float(100.0 * (1.0 - x[..., 4].mean())),
    }
    found = {}
    for name, measure in measures.items():
        drawn = np.array([(measure(base[:, pick]), measure(other[:, pick])) for pick in picks])
        low, high = np.quantile(drawn[:, 1], [0.025, 0.975])
        found[name] = [measure(other), low, high]
        low, high = np.quantile(drawn[:, 1] - drawn[:, 0], [0.025, 0.975])
        found[f"{name} difference"] = [measure(other) - measure(base), low, high]
    return {name: [float(x) for x in value] for name, value in found.items()}


if __name__ == "__main__":
    main()
