"""From files of MIMIC-IV, or of a MEDS data set, to a folder of episodes."""

from __future__ import annotations

import hashlib
import platform
import resource
import sys
import time
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

import duckdb
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from sepsis_jax.cohort import binning, reading, sepsis3
from sepsis_jax.cohort.concepts import ConceptMap
from sepsis_jax.cohort.meds import attach_meds
from sepsis_jax.cohort.options import CohortOptions
from sepsis_jax.cohort.source import attach_source, describe_files, describe_release
from sepsis_jax.cohort.workspace import Workspace, open_workspace
from sepsis_jax.runs import JsonDict, Progress, silent
from worldmodel import schema
from worldmodel.episode_files import save_episodes
from worldmodel.episodes import Episodes, identities
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder


@dataclass(frozen=True)
class CohortReport:
    """What a build made.

    Attributes:
      path: the folder of episodes.
      stays, patients, rows: numbers of stays, patients and stay-steps.
      consort: lines {step, reason, excluded, remaining}.
      counts: values left out, converted, clipped or imputed; also in the manifest.
      notes: what the reader of results must know of the records, in sentences.
      seconds: wall time of each phase.
      peak_memory_mb: most memory that this process has held so far.
      manifest: what was written beside the episodes.
    """

    path: Path
    stays: int
    patients: int
    rows: int
    consort: tuple[JsonDict, ...]
    counts: JsonDict
    notes: tuple[str, ...]
    seconds: dict[str, float]
    peak_memory_mb: float
    manifest: JsonDict


def build_cohort(
    data: Path | str,
    out: Path | str,
    options: CohortOptions | None = None,
    progress: Progress = silent,
    concepts: ConceptMap | None = None,
) -> CohortReport:
    """Makes a folder of episodes from MIMIC-IV, or from a MEDS data set.

    Args:
      data: folder with `hosp/` and `icu/`, or a DuckDB file; with `concepts` a MEDS data set.
      out: folder to write, atomically.
      options: choices; the defaults are in docs/cohort.md.
      progress: called with the name of each phase and the share done (0 to 1) before it.
      concepts: what the codes of a MEDS data set mean.

    Raises:
      InputError: bad input or options, named in one line.
    """
    data, out = Path(data), Path(out)
    options = options or CohortOptions()
    _check_targets(out, options.derived_out)
    clock = _Clock(progress)
    with open_workspace(out, options) as work:
        clock.start("find tables", 0.0)
        meds = None if concepts is None else attach_meds(work, data, concepts)
        tables = attach_source(work.connection, data) if meds is None else meds.tables
        clock.start("read stays and infections", 0.02)
        counts: JsonDict = {"stays": reading.read_stays(work, tables)}
        if meds is not None:
            counts["stays"] |= meds.counts
        release = describe_release(work.connection, data) if meds is None else meds.release
        counts["infections"] = reading.read_infections(work, tables)
        sepsis3.narrow_scope(work)
        reading.read_diagnoses(work, tables)
        clock.start("read treatments", 0.08)
        counts["treatments"] = reading.read_inputs(work, tables)
        counts["outputs"] = reading.read_outputs(work, tables)
        clock.start("read charts", 0.15)
        counts["charts"] = reading.read_chart(work, tables)
        counts["treatments"] |= reading.convert_inputs(work)
        clock.start("read laboratory results", 0.5)
        counts["laboratory"] = reading.read_labs(work, tables)
        clock.start("score SOFA and find sepsis", 0.65)
        sepsis3.find_sepsis(work)
        if options.derived_out is not None:
            clock.start("write derived tables", 0.75)
            work.run("weight")
            with atomic_folder(options.derived_out, marker="sepsis3.parquet") as folder:
                sepsis3.write_derived(work, folder)
        consort = [asdict(line) for line in sepsis3.choose_stays(work)]
        counts["cohort"] = sepsis3.count_doubts(work)
        notes = _notes(work) + ([] if meds is None else meds.notes)
        clock.start("bin measurements", 0.8)
        episodes, edges, binned = _make_episodes(work)
        counts |= binned
    clock.start("write episodes", 0.95)
    manifest = {
        "source": "mimic-iv" if meds is None else "meds",
        "release": release,
        "notes": notes,
        "options": options.to_dict(),
        "consort": consort,
        "counts": counts,
        "inputs": describe_files(tables),
        "versions": {
            "python": platform.python_version(),
            "duckdb": duckdb.__version__,
            "numpy": np.__version__,
            "sepsis-jax": metadata.version("sepsis-jax"),
        },
    }
    save_episodes(episodes, out, dose_edges=edges, step_hours=options.step_hours, manifest=manifest)
    clock.stop()
    return CohortReport(
        path=out,
        stays=episodes.num_stays,
        patients=len(np.unique(episodes.subject_id)),
        rows=int(np.sum(episodes.length)),
        consort=tuple(consort),
        counts=counts,
        notes=tuple(notes),
        seconds=clock.seconds,
        peak_memory_mb=_peak_memory_mb(),
        manifest=manifest,
    )


def _notes(work: Workspace) -> list[str]:
    """What is missing from the records as a whole."""
    notes = []
    if not work.scalar("SELECT count(dod) FROM patients"):
        notes.append(
            "No patient has a date of death (dod): deaths after the hospital stay are not known, "
            "and died_90d counts deaths in hospital only."
        )
    return notes


def _check_targets(out: Path, derived_out: Path | None) -> None:
    """Refuses folders that hold something else, before hours of work and before replacing them."""
    for path in filter(None, (out, derived_out)):
        if path.exists() and not path.is_dir():
            raise InputError(f"{path}: is a file; give the name of a folder")
    if out.exists() and not (out / "manifest.json").exists() and any(out.iterdir()):
        raise InputError(f"{out}: exists and is not a folder of episodes; choose another name")
    if derived_out is None:
        return
    first, second = out.resolve(), derived_out.resolve()
    if first == second or first in second.parents or second in first.parents:
        raise InputError(f"{derived_out}: derived_out must lie outside {out}; choose another name")
    ours = {f"{name}.parquet" for name in sepsis3.DERIVED}
    if derived_out.exists() and {file.name for file in derived_out.iterdir()} - ours:
        raise InputError(f"{derived_out}: holds other files than derived tables; choose another")


def split_of(subject_ids: np.ndarray, shares: tuple[float, float, float], seed: int) -> np.ndarray:
    """Split of each patient, from a hash of seed and patient: other patients do not matter.

    Args:
      subject_ids: [N] patients.
      shares: of training, validation and test.
      seed: another seed gives another split.

    Returns:
      [N] int32 index into `schema.SPLITS`.
    """
    patients, where = np.unique(subject_ids, return_inverse=True)
    uniform = [_uniform(f"{seed}:{int(patient)}") for patient in patients]
    edges = np.cumsum(shares)[:2]
    return np.searchsorted(edges, uniform, side="right").astype(np.int32)[where]


def empty_training(stays: int) -> str:
    """What to say where none of the stays is in the training split."""
    return f"the training split is empty ({stays} stays); use another seed or split"


def _uniform(text: str) -> float:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _make_episodes(work: Workspace) -> tuple[Episodes, schema.DoseEdges, JsonDict]:
    options = work.options
    stays = work.execute(
        "SELECT c.stay_id, c.subject_id, c.steps, c.age, "
        "CASE WHEN c.gender = 'M' THEN 1 ELSE 0 END AS male, m.charlson, "
        "coalesce(c.death_day - c.day_zero BETWEEN 0 AND "
        f"{options.death_days}, false) AS died_90d, c.died_in_hospital "
        "FROM cohort AS c INNER JOIN charlson AS m USING (hadm_id) ORDER BY c.row"
    ).fetchnumpy()
    length = stays["steps"].astype(np.int32)
    split = _told_split(work, stays["subject_id"])
    if split is None:
        split = split_of(stays["subject_id"], options.split, options.seed)
    train = split == 0
    if not train.any():
        raise InputError(empty_training(len(length)))
    values, measurements = binning.bin_measurements(work)
    urine, urine_counts = binning.bin_urine(work)
    ventilated = binning.bin_ventilation(work)
    vasopressor, fluid = binning.bin_doses(work)
    edges, defaulted = binning.fit_dose_edges(vasopressor, fluid, train, options)

    past = options.past_steps
    measured = np.isfinite(values[:, past:, : schema.NUM_MASKED])
    no_urine = np.isnan(urine) & (np.arange(urine.shape[1]) < length[:, None])
    values[:, past:, schema.URINE] = urine
    filled, urine_24h, imputation = binning.fill_rows(
        values, length, train, options, past=past, lead=options.lead_steps
    )
    if options.sofa == "row":
        score = binning.score_rows(
            filled, ventilated, vasopressor, urine_24h, lead=options.lead_steps
        )
    else:
        score = binning.bin_sofa(work)
    fields: dict[str, np.ndarray] = dict(
        dynamic=filled,
        measured=measured,
        static=np.stack([stays["age"], stays["male"], stays["charlson"]], -1).astype(np.float32),
        vasopressor=schema.dose_level(vasopressor, edges.vasopressor).astype(np.int32),
        fluid=schema.dose_level(fluid, edges.fluid).astype(np.int32),
        vasopressor_dose=vasopressor,
        fluid_dose=fluid,
        ventilated=ventilated,
        sofa=score,
        urine_24h=urine_24h,
        behavior_prob=np.full(score.shape, np.nan, np.float32),
        length=length,
        died_90d=stays["died_90d"].astype(np.bool_),
        died_in_hospital=stays["died_in_hospital"].astype(np.bool_),
        stay_id=stays["stay_id"],
        subject_id=stays["subject_id"],
        split=split,
    )
    counts = {
        **measurements,
        "urine": urine_counts | {"steps without a urine record": int(no_urine.sum())},
        "imputation": imputation,
        "dose_edges_defaulted": defaulted,
        "split": stays_by_split(split),
    }
    return padded_episodes(fields), edges, counts


def _told_split(work: Workspace, subject_ids: np.ndarray) -> np.ndarray | None:
    """The source's own split of each patient, where it is to be kept."""
    if not work.rows("SELECT 1 FROM duckdb_tables() WHERE table_name = 'subject_split'"):
        return None
    split = dict(work.rows("SELECT subject_id, split FROM subject_split"))
    return np.array([split[patient] for patient in subject_ids.tolist()], np.int32)


def stays_by_split(split: Int[np.ndarray, " N"]) -> dict[str, int]:
    """Number of stays in each split, of indices into `schema.SPLITS`."""
    return {name: int((split == i).sum()) for i, name in enumerate(schema.SPLITS)}


def padded_episodes(fields: dict[str, np.ndarray]) -> Episodes:
    """Episodes of arrays by the name of the field, with zeros after the end of each stay."""
    valid = np.arange(fields["sofa"].shape[1]) < fields["length"][:, None]
    padded = {}
    stay_id, subject_id = (identities(fields.pop(name)) for name in ("stay_id", "subject_id"))
    for name, value in fields.items():
        if value.shape[:2] == valid.shape:
            within = valid.reshape(*valid.shape, *(1,) * (value.ndim - 2))
            value = np.where(within, value, np.zeros((), value.dtype))
        padded[name] = jnp.asarray(value)
    return Episodes(stay_id=stay_id, subject_id=subject_id, **padded)


def _peak_memory_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (2**20 if sys.platform == "darwin" else 2**10), 1)


class _Clock:
    """Tells the progress callback and keeps the wall time of each phase."""

    def __init__(self, progress: Progress) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress
        self._phase: str | None = None
        self._since = 0.0

    def start(self, phase: str, share: float) -> None:
        self._close()
        self._phase, self._since = phase, time.monotonic()
        self._progress(phase, share)

    def stop(self) -> None:
        self._close()
        self._progress("done", 1.0)

    def _close(self) -> None:
        if self._phase:
            self.seconds[self._phase] = round(time.monotonic() - self._since, 2)
            self._phase = None
