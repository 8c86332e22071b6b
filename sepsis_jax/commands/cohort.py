"""`sepsis-jax cohort` and `sepsis-jax audit`: episodes are made, and checked for leakage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sepsis_jax.console import (
    DISCLAIMER,
    Config,
    Episodes,
    Json,
    OtherSeed,
    Out,
    Seed,
    Setting,
    console,
    finite,
    phases,
    print_json,
    print_table,
    with_seed,
)
from sepsis_jax.runs import claimed
from worldmodel.configuration import LARGEST

if TYPE_CHECKING:
    from sepsis_jax.cohort.own_table import OwnCohort, OwnTableOptions

app = typer.Typer(
    help="Make episodes from MIMIC-IV, other records or the synthetic world.", no_args_is_help=True
)
CohortSetting = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "--option",
        "-o",
        help="A setting as NAME=VALUE, such as -o step_hours=2 "
        "-o vasopressor_factors=ai-clinician; docs/cohort.md lists them.",
    ),
]


@app.command(
    "mimic-iv",
    epilog="Example: sepsis-jax cohort mimic-iv --data mimic-iv-3.1 --out runs/cohort",
)
def mimic_iv(
    data: Annotated[
        Path,
        typer.Option("--data", help="MIMIC-IV: a folder with hosp/ and icu/, or a DuckDB file."),
    ],
    out: Out,
    option: CohortSetting = None,
    config: Config = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Sepsis-3 stays of MIMIC-IV (2.2 to 3.1) as episodes of 4-hour steps."""
    _build(data, out, option, config, seed, json=json)


@app.command(
    "meds",
    epilog="Example: sepsis-jax cohort meds --data mimic-iv-meds --map configs/meds_mimic_iv.yaml "
    "--out runs/cohort",
)
def meds(
    data: Annotated[
        Path, typer.Option("--data", help="A MEDS data set: a folder that holds data/.")
    ],
    concept_map: Annotated[
        Path,
        typer.Option(
            "--map",
            help="YAML of what the codes mean; configs/meds_template.yaml explains its parts.",
        ),
    ],
    out: Out,
    option: CohortSetting = None,
    config: Config = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Sepsis-3 stays of any hospital as episodes, from MEDS files and a map of their codes."""
    _build(data, out, option, config, seed, json=json, concept_map=concept_map)


def _build(
    data: Path,
    out: Path,
    option: list[str] | None,
    config: Path | None,
    seed: int | None,
    *,
    json: bool,
    concept_map: Path | None = None,
) -> None:
    from sepsis_jax.cohort import CohortOptions, build_cohort
    from sepsis_jax.cohort.concepts import load_concept_map
    from worldmodel.configuration import resolve_config

    overrides = [*(option or []), *([f"seed={seed}"] if seed is not None else [])]
    options = resolve_config(CohortOptions, config, overrides, source="--option")
    concepts = None if concept_map is None else load_concept_map(concept_map)
    with claimed(out), phases("cohort") as progress:
        report = build_cohort(data, out, options, progress, concepts)
    print_table(
        "Who is in the cohort",
        ("step", "excluded", "remaining"),
        [(line["reason"], line["excluded"], line["remaining"]) for line in report.consort],
    )
    console.print(
        f"{report.stays} stays, {report.rows} steps of {options.step_hours} h in {report.path}"
    )
    for note in report.notes:
        console.print(note)
    if json:
        print_json({"out": str(report.path), "stays": report.stays, "rows": report.rows,
                    "consort": report.consort, "notes": report.notes})  # fmt: skip


@app.command(
    "synthetic",
    epilog="Example: sepsis-jax cohort synthetic --patients 20000 --out runs/synthetic",
)
def synthetic(
    out: Out,
    patients: Annotated[
        int, typer.Option("--patients", min=1, max=LARGEST, help="Number of stays.")
    ] = 2000,
    confounding: Annotated[
        float,
        typer.Option(
            "--confounding",
            callback=finite,
            help="How much the clinician acts on a severity that is not recorded; 0 is none.",
        ),
    ] = 0.0,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Patients of the synthetic world, treated by its clinician, with known probabilities."""
    from sepsis_jax.pipelines.episodes import make_synthetic_cohort

    with claimed(out), phases("synthetic patients") as progress:
        summary = make_synthetic_cohort(
            out, patients=patients, confounding=confounding, seed=seed, progress=progress
        )
    print_table("Synthetic cohort", ("what", "value"), list(summary.items()))
    console.print(f"written to {out}")
    if json:
        print_json({"out": str(out), **summary})


Table = Annotated[
    Path, typer.Option("--table", help="A .parquet or .csv file with one row per stay and step.")
]
Units = Annotated[
    list[str] | None,
    typer.Option(
        "--unit", help="A column in another unit, as FEATURE=UNIT, such as temp_c=F; repeat."
    ),
]


@app.command("template", epilog="Example: sepsis-jax cohort template --out own.csv")
def template(
    out: Annotated[Path, typer.Option("--out", help="A .csv or .parquet file to write.")],
    json: Json = False,
) -> None:
    """A table of ten synthetic patients to fill with one's own, and what its columns hold."""
    from sepsis_jax.cohort.own_table import describe_columns
    from sepsis_jax.pipelines.episodes import write_template
    from worldmodel.episodes import MASK_NAMES

    with claimed(out):
        rows = write_template(out)
    columns = describe_columns()
    shown = [line for line in columns if line["column"] not in MASK_NAMES[1:]]
    print_table(
        f"Columns; {MASK_NAMES[0]} stands for all {len(MASK_NAMES)} masks",
        ("column", "unit", "range", "if left out"),
        [
            (line["column"], line["unit"], line["range"], line["otherwise"] or "needed")
            for line in shown
        ],
    )
    console.print(f"{rows} rows in {out}")
    if json:
        print_json({"out": str(out), "rows": rows, "columns": columns})


@app.command(
    "table",
    epilog="Example: sepsis-jax cohort table --table own.csv --unit temp_c=F --out runs/own",
)
def table(
    table: Table,
    out: Out,
    unit: Units = None,
    config: Config = None,
    setting: Setting = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Episodes from a table of one's own; what it lacks is derived. `cohort template` has one."""
    from sepsis_jax.pipelines.episodes import make_own_cohort
    from worldmodel.errors import InputError, TableError

    options = _own_options(unit, config, setting, seed)
    try:
        with claimed(out), phases("cohort") as progress:
            made = make_own_cohort(table, out, options, progress)
    except TableError as error:
        if len(error.problems) == 1:
            raise
        _say_problems(error.problems)
        if json:
            print_json({"problems": error.problems})
        raise InputError(f"{table}: {len(error.problems)} problems, listed above") from None
    _say_made(made)
    console.print(f"{made.episodes.num_stays} stays of {options.step_hours:g} h steps in {out}")
    if json:
        print_json({"out": str(out), "stays": made.episodes.num_stays, "derived": made.derived,
                    "counts": made.counts, "notes": made.notes})  # fmt: skip


@app.command("check", epilog="Example: sepsis-jax cohort check --table own.parquet")
def check(
    table: Table,
    unit: Units = None,
    config: Config = None,
    setting: Setting = None,
    json: Json = False,
) -> None:
    """Name every problem of a table of one's own, with the settings of `cohort table`."""
    from sepsis_jax.cohort.own_table import own_cohort
    from worldmodel.errors import TableError
    from worldmodel.files import read_table

    options = _own_options(unit, config, setting, None)
    rows, problems = read_table(table), []
    try:
        _say_made(own_cohort(rows, options, source=str(table)))
    except TableError as error:
        problems = error.problems
    _say_problems(problems)
    console.print(f"{len(rows)} rows, {len(problems)} problems")
    if json:
        print_json({"rows": len(rows), "problems": problems})
    if problems:
        raise typer.Exit(2)


@app.command("drift", epilog="Example: sepsis-jax cohort drift runs/a runs/b --out runs/drift")
def drift(
    first: Annotated[Path, typer.Argument(metavar="A", help="Folder of episodes.")],
    second: Annotated[Path, typer.Argument(metavar="B", help="Another one.")],
    out: Out,
    config: Config = None,
    setting: Setting = None,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """How the patients of B differ from those of A: values, measuring, treatment and outcome."""
    from sepsis_jax.pipelines.drift import DriftConfig, as_json, run_drift
    from worldmodel.configuration import resolve_config

    options = with_seed(resolve_config(DriftConfig, config, setting, source="--set"), seed)
    with claimed(out), phases("drift") as progress:
        found = run_drift(first, second, out, options, progress)
    print_table(
        "What differs most, B less A in standard deviations",
        ("quantity", "kind", "A", "B", "difference", "low", "high", "KS", "q"),
        [
            (row.name, row.kind, row.mean_a, row.mean_b, row.smd, row.smd_low, row.smd_high,
             row.ks, row.q)
            for row in found.quantities.head(15).itertuples(index=False)
        ],
    )  # fmt: skip
    for sentence in found.words:
        console.print(sentence)
    console.print(f"{out / 'drift.csv'}, actions.csv, drift.json, drift.png.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), **as_json(found)})


def _own_options(
    unit: list[str] | None, config: Path | None, setting: list[str] | None, seed: int | None
) -> OwnTableOptions:
    from sepsis_jax.cohort.own_table import OwnTableOptions
    from worldmodel.configuration import resolve_config

    options = with_seed(resolve_config(OwnTableOptions, config, setting, source="--set"), seed)
    return replace(options, units=(*options.units, *(unit or [])))


def _say_problems(problems: list[str]) -> None:
    for problem in problems:
        console.print(problem)


def _say_made(made: OwnCohort) -> None:
    """What was derived, and how many values were measured, held, filled and converted."""
    derived: dict[str, list[str]] = {}
    for name, how in made.derived.items():
        derived.setdefault(how, []).append(name)
    lines = [
        (how, names[0] if len(names) == 1 else f"{len(names)}: {names[0]} ... {names[-1]}")
        for how, names in derived.items()
    ]
    if lines:
        print_table("Derived, since the table lacks it", ("how", "columns"), lines)
    whole = {
        name.replace("_", " "): count
        for name, count in made.counts.items()
        if isinstance(count, int)
    }
    converted = {f"converted, {name}": n for name, n in made.counts["converted"].items()}
    split = {f"stays, {name}": n for name, n in made.counts["split"].items()}
    print_table("Values", ("what", "number"), list((whole | converted | split).items()))
    for note in made.notes:
        console.print(note)


def audit(
    episodes: Episodes,
    out: Out,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="World model to check by simulation as well."),
    ] = None,
    config: Config = None,
    setting: Setting = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="End with status 1 if a check fails.")
    ] = False,
    seed: OtherSeed = None,
    json: Json = False,
) -> None:
    """Check episodes for leakage of treatments and outcomes, and a world model by simulation."""
    from sepsis_jax.pipelines.audit import AuditConfig, run_audit
    from sepsis_jax.pipelines.verdicts import (
        AUDIT_COLUMNS,
        FAIL,
        check_rows,
        summary_line,
        table_rows,
    )
    from worldmodel.configuration import resolve_config

    options = with_seed(resolve_config(AuditConfig, config, setting, source="--set"), seed)
    with claimed(out), phases("audit") as progress:
        checks = run_audit(episodes, out, model=model, config=options, progress=progress)
    print_table("Audit", AUDIT_COLUMNS, table_rows(checks))
    console.print(f"{summary_line(checks)}.")
    console.print(f"{out / 'report.html'}, audit.csv, .json.  {DISCLAIMER}")
    if json:
        print_json({"out": str(out), "checks": check_rows(checks)})
    if strict and any(check.verdict == FAIL for check in checks):
        raise typer.Exit(1)
