"""Croissant metadata of a folder of episodes: files, fields and units, for data set search.

https://docs.mlcommons.org/croissant/docs/croissant-spec.html, version 1.0. It has no dates, so
that equal cohorts have equal files.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from worldmodel import schema
from worldmodel.cards import Manifest, terms_of
from worldmodel.episodes import MASK_SUFFIX
from worldmodel.files import digest_file

FILE = "croissant.json"
_SCHEMA_ORG = "https://schema.org/"
_CONTEXT: dict[str, object] = {
    "@language": "en",
    "@vocab": _SCHEMA_ORG,
    "sc": _SCHEMA_ORG,
    "cr": "http://mlcommons.org/croissant/",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "dct": "http://purl.org/dc/terms/",
    "conformsTo": "dct:conformsTo",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "examples": {"@id": "cr:examples", "@type": "@json"},
    **{
        name: f"cr:{name}"
        for name in (
            "citeAs", "column", "equivalentProperty", "extract", "field", "fileProperty",
            "fileObject", "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key",
            "md5", "parentField", "path", "recordSet", "references", "regex", "repeated", "replace",
            "samplingRate", "separator", "source", "subField", "transform",
        )
    },
}  # fmt: skip
_MEANINGS = {
    "stay_id": "number of the stay",
    "subject_id": "number of the patient",
    "split": "train, validation or test; all stays of a patient are in one",
    "step": "number of the row since admission",
    "age": "age in years",
    "male": "1 for men",
    "charlson": "Charlson comorbidity index in points",
    "vasopressor_level": "vasopressor given after the row, from 0 (none) to 4",
    "fluid_level": "intravenous fluid given after the row, from 0 (none) to 4",
    "vasopressor_dose": "norepinephrine equivalent in mcg/kg/min",
    "fluid_ml": "intravenous fluid in mL per step",
    "ventilated": "invasive ventilation",
    "sofa": "SOFA score in points",
    "urine_24h": "urine output of 24 h in mL",
    "behavior_prob": "probability of the treatment under who chose it; empty if unknown",
    "died_90d": "death within 90 days of admission",
    "died_in_hospital": "death in hospital",
}


def croissant(
    folder: Path, table: str, columns: Mapping[str, object], manifest: Manifest
) -> dict[str, object]:
    """The JSON-LD of a data set.

    Args:
      folder: with the files.
      table: name of the Parquet file in it.
      columns: NumPy or pandas type by name of its columns.
      manifest: of the folder.
    """
    terms = terms_of(manifest.get("source"))
    found: dict[str, object] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": "sepsis-stays",
        "version": f"{manifest['schema_version']}.0.0",
        "description": (
            f"{manifest['stays']} stays of patients with sepsis in steps of "
            f"{manifest['step_hours']:g} h, from {terms.source}. {terms.note}"
        ),
        "distribution": [
            {
                "@type": "cr:FileObject",
                "@id": name,
                "name": name,
                "contentUrl": name,
                "encodingFormat": (
                    "application/x-parquet" if name == table else "application/json"
                ),
                "sha256": digest_file(folder / name),
            }
            for name in sorted(path.name for path in folder.iterdir() if path.name != FILE)
            if name == table or name.endswith(".json")
        ],
        "recordSet": [
            {
                "@type": "cr:RecordSet",
                "@id": "steps",
                "name": "steps",
                "description": "one record per stay and step",
                "key": [{"@id": "steps/stay_id"}, {"@id": "steps/step"}],
                "field": [
                    {
                        "@type": "cr:Field",
                        "@id": f"steps/{name}",
                        "name": name,
                        "description": _meaning(name),
                        "dataType": _data_type(dtype),
                        "source": {"fileObject": {"@id": table}, "extract": {"column": name}},
                    }
                    for name, dtype in columns.items()
                ],
            }
        ],
    }
    if terms.license is not None:
        found["license"] = terms.license
    return found


def _meaning(name: str) -> str:
    if name in schema.INDEX:
        return f"{name} in {schema.FEATURES[schema.INDEX[name]].unit}"
    if name.endswith(MASK_SUFFIX):
        return f"whether {name.removesuffix(MASK_SUFFIX)} was measured in the step"
    return _MEANINGS[name]


def _data_type(dtype: object) -> str:
    kind = np.dtype(dtype).kind if isinstance(dtype, np.dtype) else "O"
    return {"b": "sc:Boolean", "i": "sc:Integer", "u": "sc:Integer", "f": "sc:Float"}.get(
        kind, "sc:Text"
    )
