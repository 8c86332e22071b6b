"""Infusions: vasoactive drugs and fluids in the units of `items`, and what was set aside."""

from __future__ import annotations

from sepsis_jax.cohort import items
from sepsis_jax.cohort.reading import drop_repeats, listed, stop_at_unknown_units
from sepsis_jax.cohort.source import RawTable, reading
from sepsis_jax.cohort.units import rate_conversion, volume_conversion
from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict


def read_inputs(work: Workspace, tables: dict[str, RawTable]) -> JsonDict:
    """Tables `vasoactive_matched` and `fluid_matched`: infusions with what their units mean.

    Returns:
      Counts of repeated rows and unknown units.

    Raises:
      InputError: a unit is unknown and the options ask to stop at one.
    """
    drugs = [(name, *about, False) for name, about in items.VASOACTIVES.items()]
    drugs += [(name, *about, True) for name, about in items.EXTENDED_VASOACTIVES.items()]
    work.create(
        "vasoactive_items",
        ("itemid", "drug", "unit", "cap", "extended"),
        (
            (item, drug, unit, cap, extended)
            for drug, numbers, unit, cap, extended in drugs
            for item in numbers
        ),
    )
    work.create("fluid_items", ("itemid", "isotonic"), items.FLUIDS.items())
    needed = listed([item for _, numbers, *_ in drugs for item in numbers] + [*items.FLUIDS])
    with reading(tables["inputevents"]), work.joined_as_written():
        work.execute(
            "CREATE TABLE inputs AS SELECT * EXCLUDE (statusdescription) REPLACE ("
            "CASE WHEN isfinite(amount) THEN amount END AS amount, "
            "CASE WHEN isfinite(rate) THEN rate END AS rate), "
            "lower(trim(statusdescription)) = 'rewritten' AS rewritten FROM raw_inputevents "
            f"WHERE itemid IN ({needed}) AND stay_id IN (SELECT stay_id FROM stays)"
        )
    repeated = drop_repeats(work, "inputs")
    _find_units(work)
    work.run("inputs")
    unknown = [
        {"column": column, "item": item, "unit": unit, "rows": rows}
        for column, item, unit, rows in work.rows(
            "SELECT source_column, item, unit, rows FROM unknown_units ORDER BY ALL"
        )
    ]
    stop_at_unknown_units(work, tables["inputevents"], unknown)
    return ({"repeated rows": repeated} if repeated else {}) | {"unknown_units": unknown}


def convert_inputs(work: Workspace) -> JsonDict:
    """Tables `vasoactive_rows` and `fluid_rows`; needs the weights of `chart`.

    Returns:
      Counts of the rows that were set aside or changed.
    """
    work.run("doses")
    return dict(work.rows("SELECT name, rows FROM input_counts WHERE rows > 0 ORDER BY name"))


def _find_units(work: Workspace) -> None:
    """Tables `rate_units` and `fluid_units`: the known ones of the units that occur."""
    work.execute(
        "CREATE TABLE rate_units (unit VARCHAR, rateuom VARCHAR, factor DOUBLE, "
        "weight_power INTEGER)"
    )
    for drug_unit, unit in work.rows(
        "SELECT DISTINCT unit, rateuom FROM inputs INNER JOIN vasoactive_items USING (itemid)"
    ):
        rate = rate_conversion(drug_unit, unit)
        if rate is not None:
            row = (drug_unit, unit, rate.scale, rate.weight_power)
            work.connection.execute("INSERT INTO rate_units VALUES (?, ?, ?, ?)", row)
    work.execute("CREATE TABLE fluid_units (itemid INTEGER, amountuom VARCHAR, factor DOUBLE)")
    for item, unit in work.rows(
        "SELECT DISTINCT itemid, amountuom FROM inputs INNER JOIN fluid_items USING (itemid)"
    ):
        volume = volume_conversion(item, unit)
        if volume is not None:
            work.connection.execute(
                "INSERT INTO fluid_units VALUES (?, ?, ?)", (item, unit, volume.scale)
            )
