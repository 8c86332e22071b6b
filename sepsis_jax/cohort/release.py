"""Which release of MIMIC-IV the files are of: what they say of themselves, and what tells it."""

from __future__ import annotations

import re
from pathlib import Path

from sepsis_jax.cohort.workspace import Workspace
from sepsis_jax.runs import JsonDict

# Rows of patients, admissions and icustays of the releases, as PhysioNet describes them.
_RELEASES: dict[tuple[int, int, int], str] = {
    (100, 275, 140): "MIMIC-IV demo 2.2",
    (299_712, 431_231, 73_181): "MIMIC-IV 2.2",
    (364_627, 546_028, 94_458): "MIMIC-IV 3.0 or 3.1",
}
# Files that PhysioNet puts beside the tables.
_LEAFLETS = ("CHANGELOG.txt", "README.md", "README.txt", "LICENSE.txt", "index.html")
_VERSION = re.compile(r"(?:mimic[- ]?iv\D{0,60}?v?|^v?)(\d\.\d(?:\.\d)?)\b", re.IGNORECASE)


def describe_release(work: Workspace, data: Path) -> JsonDict:
    """The release by its number of rows, its folder's name and the leaflets beside the tables.

    Args:
      work: with the tables `patients`, `admissions` and `icustays`, each row once.
      data: where the source lies.

    Returns:
      `name` by the number of rows (None if no known release has them), `rows` of the three
      tables, `folder` and the version in it or in a leaflet (`version`, None if none is found).
    """
    tables = ("patients", "admissions", "icustays")
    rows = {name: int(work.scalar(f"SELECT count(*) FROM {name}")) for name in tables}
    folder = data.resolve()
    texts = [f"mimic-iv {folder.name}", folder.parent.name]
    for leaflet in _LEAFLETS:
        file = folder / leaflet
        if file.is_file():
            texts.append(file.read_text(encoding="utf-8", errors="replace")[:20_000])
    found = (match for text in texts if (match := _VERSION.search(text)))
    return {
        "name": _RELEASES.get((rows["patients"], rows["admissions"], rows["icustays"])),
        "version": next((match[1] for match in found), None),
        "folder": folder.name,
        "rows": rows,
    }
