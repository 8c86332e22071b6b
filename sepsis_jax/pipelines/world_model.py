"""Training a world model from a folder of episodes, and its effects beside the true ones."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from scipy.stats import pearsonr, spearmanr

from sepsis_jax.report.figures import effects_figure
from sepsis_jax.runs import JsonDict, Progress, provenance, silent
from worldmodel import schema
from worldmodel.compilation import in_blocks
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes,
    load_manifest,
    load_scaler,
)
from worldmodel.files import atomic_folder, check_replaceable, digest_file, write_json
from worldmodel.models.checkpoint import PARAMS, load_world_model, save_world_model
from worldmodel.models.training import EpochProgress, TrainConfig, Trained, train_world_model
from worldmodel.models.windows import Sequences, encode_action, to_sequences, transition_index
from worldmodel.models.world_model import WorldModel
from worldmodel.synthetic import generate
from worldmodel.synthetic.truth import true_action_effects

HEADLINES = ("split", "stays", "transitions", "state", "outcome", "outcome_every_step")


def train(
    episodes_path: str | Path,
    out: str | Path,
    config: TrainConfig,
    *,
    progress: EpochProgress | None = None,
) -> Trained:
    """Trains on a folder of episodes and writes the world model beside its metrics.

    The state of an unfinished run is kept in `<out>.training`; the same call goes on from
    there. It is removed when the model is written.

    Args:
      episodes_path: folder of episodes.
      out: folder of the world model to write: parameters, scaler, manifest, metrics.json.
      config: what to train and how.
      progress: called after each epoch.
    """
    episodes_path, out = Path(episodes_path), Path(out)
    manifest = load_manifest(episodes_path)
    check_replaceable(out, PARAMS)  # before hours of training, not after
    state_folder = out.with_name(f"{out.name}.training")
    trained = train_world_model(
        load_episodes(episodes_path),
        load_scaler(episodes_path),
        config,
        step_hours=manifest["step_hours"],
        dose_edges=load_dose_edges(episodes_path),
        state_folder=state_folder,
        progress=progress,
    )
    save_world_model(
        trained.world_model,
        out,
        manifest=provenance(
            training=asdict(config),
            metrics=summary(trained.metrics),
            episodes={
                "source": manifest.get("source"),
                "stays": manifest.get("stays"),
                "sha256": digest_file(episodes_path / EPISODES_FILE),
            },
        ),
    )
    write_json(out / "metrics.json", {**trained.metrics, "history": trained.history})
    shutil.rmtree(state_folder)
    return trained


def summary(metrics: JsonDict) -> JsonDict:
    """The headline figures of a world model, without the per-feature table."""
    return {name: metrics[name] for name in HEADLINES}


FEATURES = ("meanbp", "lactate")
_STATES_PER_CALL = 2000


def learned_next_state(
    world_model: WorldModel, sequences: Sequences, index: np.ndarray
) -> np.ndarray:
    """Mean next state [K, 25, 39], physical units, under each action in the newest row."""

    @jax.jit
    def of_states(rows: jax.Array) -> jax.Array:
        window = sequences.window(rows, schema.STATE_WINDOW)

        def of_action(action: jax.Array) -> jax.Array:
            newest = jnp.broadcast_to(encode_action(action), window.action[:, -1].shape)
            changed = window.action.at[:, -1].set(newest)
            mu = world_model.transition(window.obs, window.observed, window.static, changed).mu
            return world_model.scaler.denormalize(mu)

        by_action: jax.Array = jax.lax.map(of_action, jnp.arange(schema.NUM_ACTIONS))
        return by_action.swapaxes(0, 1)

    block = min(_STATES_PER_CALL, len(index))
    found: np.ndarray = in_blocks(
        lambda rows: of_states(jnp.asarray(index[rows])), len(index), block
    )
    return found


def compare_effects(
    model: str | Path,
    out: str | Path,
    *,
    patients: int,
    seed: int,
    progress: Progress = silent,
) -> dict[str, dict[str, float]]:
    """Ranks of the 25 actions' mean effects on MAP and lactate, learned against true.

    The states are those of fresh patients under the clinician, all steps of each; an action's
    effect is the mean over states of the next value under it minus that under no treatment.

    Args:
      model: folder of a world model trained in the synthetic world.
      out: folder for effects.csv, effects.png and metrics.json.
      patients: fresh synthetic patients.
      seed: of their world; another seed than the training data's.
      progress: called with (phase, share done).
    """
    world_model = load_world_model(model)
    progress("simulating patients", 0.0)
    episodes, truth = generate(jax.random.key(seed), patients)
    index = transition_index(episodes)
    progress("true effects", 0.3)
    true = true_action_effects(truth, index[:, 0], index[:, 1])
    progress("learned effects", 0.5)
    sequences = to_sequences(episodes, world_model.scaler)
    learned = learned_next_state(world_model, sequences, index)
    table = pd.DataFrame({"action": [schema.action_name(a) for a in range(schema.NUM_ACTIONS)]})
    table["vasopressor"], table["fluid"] = schema.action_levels(np.arange(schema.NUM_ACTIONS))
    result = {}
    for name in FEATURES:
        true_mean = np.asarray(getattr(true, name)).mean(0)
        learned_mean = learned[..., schema.INDEX[name]].mean(0)
        true_effect, learned_effect = true_mean - true_mean[0], learned_mean - learned_mean[0]
        table[f"{name}_true"], table[f"{name}_learned"] = true_effect, learned_effect
        result[name] = {
            "spearman": float(spearmanr(true_effect, learned_effect).statistic),
            "pearson": float(pearsonr(true_effect, learned_effect).statistic),
            "mean_absolute_error": float(np.abs(true_effect - learned_effect).mean()),
            "largest_true_effect": float(np.abs(true_effect).max()),
        }
    with atomic_folder(Path(out), marker="effects.csv") as folder:
        table.to_csv(folder / "effects.csv", index=False)
        write_json(folder / "metrics.json", {"states": len(index), **result})
        effects_figure(table, folder / "effects.png")
    progress("done", 1.0)
    return result
