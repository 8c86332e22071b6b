"""Concept maps: which codes of a MEDS data set mean what, from a YAML file.

MEDS (Medical Event Data Standard) fixes the columns of a table of events and leaves the codes to
each hospital. A map lists, for each concept of the cohort, the codes that tell it;
configs/meds_template.yaml explains every part.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from sepsis_jax.cohort import items
from sepsis_jax.cohort.units import UNITS, conversion, rate_conversion, volume_conversion
from worldmodel import schema
from worldmodel.configuration import read_yaml
from worldmodel.errors import InputError

# Names of columns of the data, beside those that MEDS fixes.
COLUMNS = (
    "stay", "hospital_stay", "order", "unit", "status", "route", "specimen", "comments",
)  # fmt: skip

_CHART = {name: numbers[0] for name, numbers in items.FEATURE_CHART.items()} | {
    "gcs_eye": items.GCS_EYES,
    "gcs_verbal": items.GCS_VERBAL,
    "gcs_motor": items.GCS_MOTOR,
    "weight": items.WEIGHT_DAILY,
    "weight_admission": items.WEIGHT_ADMIT,
    "ventilator_mode": items.VENTILATOR_MODE,
    "hamilton_mode": items.HAMILTON_MODE,
    "oxygen_device": items.OXYGEN_DEVICE,
    "oxygen_flow": items.OXYGEN_FLOW[0],
    "ventilation": items.VENTILATOR_MODE,
}
_LABS = {name: numbers[0] for name, numbers in items.FEATURE_LABS.items()} | {
    "fio2": items.LAB_FIO2,
    "specimen_type": items.SPECIMEN_TYPE,
}
_URINE = {"urine": items.URINE_ITEMS[0], "irrigant": items.IRRIGANT_IN}
_DRUGS = {name: (about[0][0], about[1]) for name, about in items.EXTENDED_VASOACTIVES.items()}
_DRUGS |= {name: (about[0][0], about[1]) for name, about in items.VASOACTIVES.items()}
# section -> concept -> item of MIMIC-IV that stands for it, 0 where there is none.
CONCEPTS: dict[str, dict[str, int]] = {
    "stays": dict.fromkeys(
        ("icu_admission", "icu_discharge", "hospital_admission", "hospital_discharge",
         "died_in_hospital"), 0
    ),
    "patients": dict.fromkeys(
        ("birth", "age", "death", "male", "female", "weight_at_infusion"), 0
    ),
    "chart": _CHART,
    "laboratory": _LABS,
    "output": _URINE,
    "vasoactives": {name: item for name, (item, _) in _DRUGS.items()},
    "fluids": items.FLUID_NAMES,
    "infection": {"antibiotics": 0, "cultures": 0},
    "diagnoses": {"icd": 0},
}  # fmt: skip
# Of each group at least one concept must be found in the data.
NEEDED: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stays", ("icu_admission",)),
    ("stays", ("icu_discharge",)),
    ("patients", ("birth", "age")),
    ("patients", ("male", "female")),
    ("chart", ("heart_rate",)),
)
_WITH_TEXT = (
    "gcs_verbal", "ventilator_mode", "hamilton_mode", "oxygen_device", "ventilation",
    "specimen_type",
)  # fmt: skip
_PARTS = ("start", "end", "rate", "bolus")  # of infusions
_CAPTURED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("chart", "laboratory", "output", "vasoactives", "fluids"), ("unit",)),
    "infection": ("drug",),
    "diagnoses": ("version", "icd"),
}
_MISSING = ("", "UNK", "None", "nan")  # units in a code that tell none
_MEDS_SPLITS = ("train", "tuning", "held_out")


@dataclass(frozen=True)
class Code:
    """A code, or a pattern of codes, of one concept.

    Attributes:
      section, concept: what it means; keys of `CONCEPTS`.
      entry: number of the entry in the map, which pairs the starts of infusions with their ends.
      part: of an infusion: "start", "end", "rate" (from now on) or "bolus"; else "".
      pattern: as written: `*` stands for any text, `<unit>` and the like for what it names.
      item: of MIMIC-IV.
      unit: of values where neither code nor data tell one.
      drug, route: of an antibiotic, where the code or the data do not tell.
      version: of ICD.
      arterial: the value is of arterial blood.
      texts: status of ventilation by charted text; the key "" is any text.
    """

    section: str
    concept: str
    entry: int
    part: str
    pattern: str
    item: int
    unit: str | None = None
    drug: str | None = None
    route: str | None = None
    version: int | None = None
    arterial: bool = False
    texts: Mapping[str, str] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        """Whether the pattern is one code."""
        return not re.search(r"\*|<\w+>", self.pattern)

    @property
    def with_text(self) -> bool:
        """Whether the text of an event matters beside its number."""
        return self.concept in _WITH_TEXT

    def expression(self) -> re.Pattern[str]:
        """The pattern as a regular expression of whole codes."""
        parts = re.split(r"(\*|<\w+>)", self.pattern)
        texts = (
            ".*" if part == "*" else f"(?P{part}.*)" if part.startswith("<") else re.escape(part)
            for part in parts
        )
        return re.compile("".join(texts))


@dataclass(frozen=True)
class ConceptMap:
    """A concept map, checked.

    Attributes:
      path: file of the map, named in errors.
      columns: column of the data by what it holds (`COLUMNS`), and whether it may be missing.
      codes: every code of every concept.
      splits: our split by that of `metadata/subject_splits.parquet`; empty for a split by hash.
    """

    path: Path
    columns: dict[str, tuple[str, bool]]
    codes: tuple[Code, ...]
    splits: dict[str, str]


class CodeFinder:
    """Finds the entries of a map that a code belongs to."""

    def __init__(self, codes: Iterable[Code]) -> None:
        self._exact: dict[str, list[Code]] = {}
        self._patterns: list[tuple[str, re.Pattern[str], Code]] = []
        for code in codes:
            if code.exact:
                self._exact.setdefault(code.pattern, []).append(code)
            else:
                begin = re.split(r"[*<]", code.pattern, maxsplit=1)[0]
                self._patterns.append((begin, code.expression(), code))

    def find(self, code: str) -> Iterator[tuple[Code, dict[str, str]]]:
        """Entries of a code, with the texts that their patterns name."""
        for entry in self._exact.get(code, ()):
            yield entry, {}
        for begin, expression, entry in self._patterns:
            match = expression.fullmatch(code) if code.startswith(begin) else None
            if match:
                found = match.groupdict()
                yield entry, {name: text for name, text in found.items() if text not in _MISSING}


def load_concept_map(path: Path | str) -> ConceptMap:
    """Reads and checks a concept map.

    Raises:
      InputError: the file is unreadable, or a section, concept, key, unit or pattern is unknown.
    """
    path = Path(path)
    try:
        content = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; begin with configs/meds_template.yaml") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not readable YAML ({' '.join(str(error).split())})") from None
    known = ("columns", *CONCEPTS, "splits")
    sections = _mapping(content, str(path), known, "section")
    columns = _columns(sections.pop("columns", None), f"{path}: columns")
    splits = _splits(sections.pop("splits", None), f"{path}: splits")
    codes: list[Code] = []
    for section, concepts in sections.items():
        where = f"{path}: {section}"
        for concept, entries in _mapping(concepts, where, CONCEPTS[section], "concept").items():
            for entry in entries if isinstance(entries, list) else [entries]:
                reader = _EntryReader(section, concept, f"{where}.{concept}")
                codes.extend(reader.codes(entry, number=len(codes)))
    if not codes:
        raise InputError(f"{path}: has no codes; begin with configs/meds_template.yaml")
    return ConceptMap(path, columns, tuple(codes), splits)


def _mapping(value: object, where: str, known: Collection[str], what: str) -> dict[str, object]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InputError(f"{where}: got {value!r}, expected names with values below it")
    for name in value:
        if name not in known:
            raise InputError(
                f"{where}: {what} {name!r} is unknown; expected one of {', '.join(known)}"
            )
    return dict(value)


def _columns(value: object, where: str) -> dict[str, tuple[str, bool]]:
    columns = {}
    for role, name in _mapping(value, where, COLUMNS, "column").items():
        if not isinstance(name, str) or not name.strip("?"):
            raise InputError(f"{where}.{role}: got {name!r}, expected the name of a column")
        columns[role] = (name.removesuffix("?"), name.endswith("?"))
    return columns


def _splits(value: object, where: str) -> dict[str, str]:
    if isinstance(value, dict) and not value:
        raise InputError(f"{where}: is empty; name splits, such as held_out: test")
    splits = {}
    for name, ours in value.items() if isinstance(value, dict) else ():
        if ours not in schema.SPLITS:
            expected = ", ".join(schema.SPLITS)
            raise InputError(f"{where}.{name}: got {ours!r}, expected one of {expected}")
        splits[str(name)] = str(ours)
    if value is not None and not splits:
        names = ", ".join(_MEDS_SPLITS)
        raise InputError(f"{where}: got {value!r}, expected our split for each of {names}")
    return splits


@dataclass(frozen=True)
class _EntryReader:
    """Reads the entries of one concept."""

    section: str
    concept: str
    where: str

    def codes(self, entry: object, *, number: int) -> Iterator[Code]:
        """The codes of an entry: a text, or a mapping with more about it."""
        infused = self.section in ("vasoactives", "fluids")
        about = entry if isinstance(entry, dict) else {"bolus" if infused else "code": entry}
        about = _mapping(about, self.where, self._keys(), "key")
        item = CONCEPTS[self.section][self.concept]
        if self._boolean(about, "extended"):
            item = items.EXTENDED_VASOACTIVES["phenylephrine"][0][0]
        texts = self._texts(about)
        for part in self._parts(about):
            for pattern in self._patterns(about[part or "code"], part):
                yield Code(
                    section=self.section,
                    concept=self.concept,
                    entry=number,
                    part=part,
                    pattern=pattern,
                    item=item,
                    unit=self._unit(about, part),
                    drug=self._text(about, "drug"),
                    route=self._text(about, "route"),
                    version=self._version(about, pattern),
                    arterial=self._boolean(about, "arterial"),
                    texts=texts,
                )

    def _keys(self) -> tuple[str, ...]:
        if self.section in ("vasoactives", "fluids"):
            extended = ("extended",) if self.concept == "phenylephrine" else ()
            return (*_PARTS, "rate_unit", "amount_unit", "unit", *extended)
        if self.concept == "ventilation":
            return ("code", "status", "texts")
        if self.concept == "antibiotics":
            return ("code", "drug", "route")
        more = {"chart": ("unit",), "output": ("unit",), "laboratory": ("unit", "arterial"),
                "diagnoses": ("version",)}  # fmt: skip
        return ("code", *more.get(self.section, ()))

    def _parts(self, about: dict[str, object]) -> tuple[str, ...]:
        """Which of the entry's keys name codes."""
        if self.section not in ("vasoactives", "fluids"):
            if "code" not in about:
                raise InputError(f"{self.where}: has no code; give one, as code: CODE")
            return ("",)
        parts = tuple(part for part in _PARTS if part in about)
        if parts not in (("start", "end"), ("rate",), ("bolus",)):
            raise InputError(
                f"{self.where}: got {', '.join(parts) or 'no code'}; give start and end, or rate "
                "(in force until the next one), or for fluids bolus (given at once)"
            )
        if parts == ("bolus",) and self.section == "vasoactives":
            raise InputError(f"{self.where}: a bolus has no rate; give start and end, or rate")
        return parts

    def _patterns(self, value: object, part: str) -> Iterator[str]:
        for pattern in value if isinstance(value, list) else [value]:
            if not isinstance(pattern, str) or not pattern.strip():
                raise InputError(f"{self.where}: got {pattern!r}, expected a code as text")
            allowed = _CAPTURED.get(self.section, ()) if self.concept != "cultures" else ()
            names = re.findall(r"<(\w+)>", pattern)
            wrong = [name for name in names if name not in allowed]
            if wrong or len(set(names)) < len(names):
                expected = " and ".join(f"<{name}>" for name in allowed) or "none"
                raise InputError(
                    f"{self.where}: {pattern!r} names <{(wrong or names)[0]}>; "
                    f"a code of this section may name {expected}, each once"
                )
            yield pattern

    def _text(self, about: dict[str, object], key: str) -> str | None:
        value = about.get(key)
        if value is not None and (not isinstance(value, str) or not value.strip()):
            raise InputError(f"{self.where}: {key}: got {value!r}, expected text")
        return value

    def _boolean(self, about: dict[str, object], key: str) -> bool:
        value = about.get(key, False)
        if not isinstance(value, bool):
            raise InputError(f"{self.where}: {key}: got {value!r}, expected true or false")
        return value

    def _version(self, about: dict[str, object], pattern: str) -> int | None:
        version = about.get("version")
        if self.section != "diagnoses":
            return None
        if "<icd>" not in pattern:
            raise InputError(f"{self.where}: {pattern!r} has no <icd>, the code of the diagnosis")
        if version not in (9, 10) and not (version is None and "<version>" in pattern):
            raise InputError(
                f"{self.where}: version: got {version!r}, expected 9 or 10, or "
                "<version> in the code"
            )
        return int(str(version)) if version is not None else None

    def _unit(self, about: dict[str, object], part: str) -> str | None:
        key = {"start": "rate_unit", "end": "amount_unit"}.get(part, "unit")
        unit = self._text(about, key)
        if unit is not None and not self._is_known(unit, part):
            quantity = self._quantity()
            rates = "such as mcg/kg/min, units/hour, mL/hour or mL"
            expected = f"one of {', '.join(UNITS[quantity])}" if quantity else rates
            raise InputError(f"{self.where}: {key}: {unit!r} is unknown; expected {expected}")
        return unit

    def _quantity(self) -> str | None:
        """What the units of the concept are of, as `UNITS` names it."""
        name = {"urine": schema.FEATURE_NAMES[schema.URINE], "weight_admission": "weight"}
        name["irrigant"] = name["urine"]
        found = name.get(self.concept, self.concept)
        return found if found in UNITS and self.section not in ("vasoactives", "fluids") else None

    def _is_known(self, unit: str, part: str) -> bool:
        if self.section == "vasoactives":
            if part == "end":
                return True  # of amounts, only those of fluids are used
            return rate_conversion(_DRUGS[self.concept][1], unit) is not None
        if self.section == "fluids":
            item = items.FLUID_NAMES[self.concept]
            amount = unit if part in ("end", "bolus") else unit.rpartition("/")[0]
            return volume_conversion(item, amount) is not None
        quantity = self._quantity()
        return quantity is None or conversion(quantity, unit) is not None

    def _texts(self, about: dict[str, object]) -> dict[str, str]:
        """Statuses of ventilation by charted text."""
        if self.concept != "ventilation":
            return {}
        status, texts = about.get("status"), about.get("texts")
        if (status is None) == (texts is None):
            raise InputError(f"{self.where}: give status, or texts with a status for each text")
        found = texts if isinstance(texts, dict) else {"": status}
        for text, name in found.items():
            if name not in items.VENTILATION_STATUSES:
                expected = ", ".join(items.VENTILATION_STATUSES)
                raise InputError(
                    f"{self.where}: status {name!r} of {text!r} is unknown; "
                    f"expected one of {expected} (None in quotation marks)"
                )
        return {str(text): str(name) for text, name in found.items()}
