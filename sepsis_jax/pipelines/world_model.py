"""Training a world model from a folder of episodes."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from sepsis_jax.runs import JsonDict, provenance
from worldmodel.episode_files import (
    EPISODES_FILE,
    load_dose_edges,
    load_episodes,
    load_manifest,
    load_scaler,
)
from worldmodel.files import check_replaceable, digest_file, write_json
from worldmodel.models.checkpoint import PARAMS, save_world_model
from worldmodel.models.training import EpochProgress, TrainConfig, Trained, train_world_model

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
