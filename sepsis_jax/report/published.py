"""Figures of the SepsisAgent paper (725 held-out stays of MIMIC-IV), and how to read them."""

from __future__ import annotations

import pandas as pd

POLICY_COLUMNS = ("dr", "wis", "wpdis_alive", "adherence", "underdosing", "overdosing")
POLICIES = pd.DataFrame(
    [
        ("clinician", 5.06, 5.27, 10.82, 94.76, 0.35, 0.19),
        ("WD3QNE", 8.72, 12.07, 23.20, 87.60, 1.11, 1.49),
        ("o3", 8.32, 9.17, 20.38, 90.55, 0.72, 1.57),
        ("o3 + world model", 9.46, 10.27, 22.95, 96.91, 0.09, 0.24),
        ("Qwen3-4B-Instruct", 7.79, 7.34, 18.76, 78.00, 0.62, 2.13),
        ("SepsisAgent", 10.01, 11.14, 23.40, 97.95, 0.08, 0.14),
    ],
    columns=["policy", *POLICY_COLUMNS],
)
STAGE_COLUMNS = ("dr", "wis", "wpdis_alive", "adherence", "unsafe", "mortality_auroc",
                 "mortality_auprc", "vasopressor_auroc", "vasopressor_auprc")  # fmt: skip
STAGES = pd.DataFrame(
    [
        ("start", 7.79, 7.34, 18.76, 78.00, 2.75, 0.6527, 0.4501, 0.7062, 0.6174),
        ("sft", 9.21, 7.17, 19.56, 88.01, 1.09, 0.6750, 0.5025, 0.7640, 0.6511),
        ("bc", 8.99, 6.81, 19.61, 96.89, 0.51, 0.6755, 0.4663, 0.7456, 0.6370),
        ("rl", 10.01, 11.14, 23.40, 97.95, 0.22, 0.6852, 0.5345, 0.7996, 0.6883),
    ],
    columns=["stage", *STAGE_COLUMNS],
)
CAVEATS = (
    "Published figures come from other patients, another clinician's model and one run each, "
    "without intervals: a difference from ours says nothing by itself.",
    "The published WPDIS gives every step a share of those still treated. It "
    "is no estimate of the value: the clinicians' own returns average 5.27, their WPDIS is 10.82. "
    "The value by WPDIS above keeps the weights of stays that have ended and estimates the value.",
    "Published adherence counts prescriptions in stays that the policy itself led; ours counts "
    "what it prescribes in recorded states. Underdosing and overdosing are not defined in the "
    "paper; ours are those of Festor et al. (2022).",
    "The published DR, WIS and WPDIS of language models need probabilities of prescriptions, and "
    "the paper does not say which it took.",
)
