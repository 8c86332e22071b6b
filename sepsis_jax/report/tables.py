"""Tables of a report as files: CSV, LaTeX and JSON."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from sepsis_jax.console import format_value
from sepsis_jax.report.html import Section, Table
from sepsis_jax.report.ope import escaped, records
from sepsis_jax.runs import JsonDict
from worldmodel.files import write_json

INDEX = "tables.json"


def write_tables(folder: Path, sections: Sequence[Section], **more: object) -> None:
    """Writes every named table as NAME.csv and NAME.tex, and all of them as tables.json.

    Args:
      folder: to write into.
      sections: of a report.
      more: other entries of tables.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found: JsonDict = {}
    for table in (table for section in sections for table in section.tables if table.name):
        data = pd.DataFrame(table.rows, columns=table.columns) if table.data is None else table.data
        data.to_csv(folder / f"{table.name}.csv", index=False)
        (folder / f"{table.name}.tex").write_text(latex(table))
        found[table.name] = records(data)
    write_json(folder / INDEX, found | more)


def latex(table: Table) -> str:
    """A booktabs table."""
    sides = "".join("r" if kind == "number" else "l" for kind in table.kinds[1:])
    lines = [
        rf"\begin{{tabular}}{{l{sides}}}",
        r"\toprule",
        " & ".join(map(escaped, table.columns)) + r" \\",
        r"\midrule",
        *(
            " & ".join("--" if value is None else escaped(format_value(value)) for value in row)
            + r" \\"
            for row in table.rows
        ),
        r"\bottomrule",
        r"\end{tabular}",
        "",
    ]
    return "\n".join(lines)
