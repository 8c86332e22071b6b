"""How many tokens each way of assigning credit needs in stage III.

    sepsis-jax policy stages --config configs/train_tiny_cpu.yaml --out runs/stages
    python scripts/bench_credit.py --stages runs/stages runs/stages-1 runs/stages-2 \
        --out runs/credit --json benchmarks/credit.json

Takes the models of stage I, world models and records of finished `policy stages`, one folder per
seed, and makes a weak clone of each by a short stage II. From there every method learns with the
same patients per iteration and the same objective. Step sizes are sought for every method with the
same number of trials on the first seed, by the value at the end; the best one then runs on all
seeds. Methods that compare whole stays have twice the iterations. Values are true ones, of held-out
synthetic patients, the same for all. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from policy.train.rl.advantages import COUNTERFACTUAL, EPISODE, STEP
from policy.train.rl.trainer import ALL, SAMPLED
from sepsis_jax.pipelines.llm.rl import RLOptions, run_rl
from sepsis_jax.pipelines.llm.setup import METRICS, MODEL
from sepsis_jax.pipelines.llm.stages import StagesOptions
from sepsis_jax.pipelines.llm.supervised import run_bc
from sepsis_jax.report.figures import COLORS, save
from sepsis_jax.runs import provenance
from worldmodel.configuration import load_config
from worldmodel.files import write_json

METHODS = {  # kind of advantages, loss of decisions, stays of each patient, share of the iterations
    "all actions": (COUNTERFACTUAL, ALL, 1, 1),
    "counterfactual": (COUNTERFACTUAL, SAMPLED, 1, 1),
    "GRPO": (EPISODE, SAMPLED, 8, 2),
    "GiGPO": (STEP, SAMPLED, 8, 2),
}
Curve = list[tuple[float, float]]  # tokens learned, true value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stages", type=Path, nargs="+", required=True, help="a folder per seed")
    parser.add_argument("--config", type=Path, default=Path("configs/train_tiny_cpu.yaml"))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-4, 6e-4, 1.8e-3])
    parser.add_argument("--clone-steps", type=int, default=500, help="updates of stage II")
    parser.add_argument("--iterations", type=int, default=10, help="of stage III; GRPO has twice")
    parser.add_argument("--patients", type=int, default=256, help="held out")
    arguments = parser.parse_args()

    options = load_config(StagesOptions, arguments.config)
    clones = [clone(stages, options, arguments) for stages in arguments.stages]
    found = {}
    for name in arguments.methods:
        trials = {
            rate: train(name, rate, 0, clones, options, arguments) for rate in arguments.rates
        }
        best = max(trials, key=lambda rate: trials[rate][-1][1])
        print(
            f"{name}: step sizes " + ", ".join(f"{r:g}: {c[-1][1]:.2f}" for r, c in trials.items())
        )
        curves = [
            trials[best] if seed == 0 else train(name, best, seed, clones, options, arguments)
            for seed in range(len(clones))
        ]
        found[name] = {
            "trials": {f"{rate:g}": curve for rate, curve in trials.items()},
            "rate": best,
            "curves": curves,
        }
        ends = [curve[-1][1] for curve in curves]
        print(f"{name}, {best:g}: {np.mean(ends):.2f} +- {np.std(ends):.2f} over seeds", flush=True)
        settings = {
            key: getattr(arguments, key)
            for key in ("rates", "clone_steps", "iterations", "patients")
        }  # fmt: skip
        write_json(arguments.json, provenance(settings=settings, methods=found))
    draw(found, arguments.json.with_suffix(".png"))


def clone(stages: Path, options: StagesOptions, arguments: argparse.Namespace) -> Path:
    """The weak clone of a seed, made once."""
    to: Path = arguments.out / stages.name / "clone"
    if not (to / MODEL / "config.json").exists():
        learner = replace(
            options.bc.training.learner, max_steps=arguments.clone_steps,
            save_steps=arguments.clone_steps,
        )  # fmt: skip
        training = replace(options.bc.training, learner=learner)
        run_bc(
            to, replace(options.bc, training=training), llm=stages / "sft" / MODEL,
            model=stages / "world_model", episodes=stages / "episodes", resume=True,
        )  # fmt: skip
    return to


def train(
    name: str,
    rate: float,
    seed: int,
    clones: list[Path],
    options: StagesOptions,
    arguments: argparse.Namespace,
) -> Curve:
    """The course of one run, which is made if it is not there."""
    kind, decision_loss, generations, times = METHODS[name]
    stages: Path = arguments.stages[seed]
    agentic = replace(
        options.rl.agentic,
        iterations=times * arguments.iterations,
        patients=options.rl.agentic.patients // generations,
        num_generations=generations,
        decision_loss=decision_loss,
        advantages=replace(options.rl.agentic.advantages, kind=kind),
    )
    chosen: RLOptions = replace(
        options.rl,
        agentic=agentic,
        learner=replace(options.rl.learner, learning_rate=rate),
        eval_steps=max(arguments.iterations // 2, 1),
        eval_patients=arguments.patients,
    )
    folder = arguments.out / stages.name / f"{name.replace(' ', '_')}-{rate:g}"
    if not (folder / MODEL / "config.json").exists():
        run_rl(
            folder, chosen, llm=clones[seed] / MODEL, model=stages / "world_model",
            episodes=stages / "episodes", resume=True,
        )  # fmt: skip
    lines = pd.read_json(folder / METRICS / "metrics.jsonl", lines=True)
    tokens = lines["learned_tokens"].fillna(0.0).cumsum()
    judged = lines["held_out_value"].notna()
    return list(zip(tokens[judged], lines.loc[judged, "held_out_value"], strict=True))


def draw(found: dict[str, dict[str, list[Curve]]], path: Path) -> None:
    """Mean and range over seeds of the true value, by tokens learned."""
    figure, axes = plt.subplots(figsize=(6.4, 4))
    for color, (name, result) in zip(COLORS, found.items(), strict=False):
        curves = np.array(result["curves"])  # [seeds, evaluations, 2]
        tokens, values = curves[..., 0].mean(0), curves[..., 1]
        axes.plot(tokens, values.mean(0), color=color, marker="o", label=name)
        axes.fill_between(tokens, values.min(0), values.max(0), color=color, alpha=0.2)
    axes.set_xlabel("tokens learned")
    axes.set_ylabel("true value of held-out patients")
    axes.legend()
    save(figure, path)


if __name__ == "__main__":
    main()
