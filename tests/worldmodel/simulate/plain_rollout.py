"""A second implementation of rollouts: one branch at a time, in plain Python."""

import jax
import numpy as np

from worldmodel import schema

I = schema.INDEX  # noqa: E741
DOSES = (0.0, 0.04, 0.15, 0.335, 0.675)  # mid-points of 0.08, 0.22, 0.45, and 1.5 x 0.45


def points(value, limits, *, below):
    return sum(value < limit if below else value >= limit for limit in limits)


def sofa(row, ventilated, cardiovascular, urine):
    ratio = row[I["pao2"]] / (max(row[I["fio2"]], 21.0) / 100)
    respiratory = points(ratio, (400, 300, 200, 100), below=True)
    if not ventilated:
        respiratory = min(respiratory, 2)
    gcs = row[I["gcs_eye"]] + row[I["gcs_verbal"]] + row[I["gcs_motor"]]
    creatinine = points(row[I["creatinine"]], (1.2, 2, 3.5, 5), below=False)
    return (
        respiratory
        + points(row[I["platelet"]], (150, 100, 50, 20), below=True)
        + points(row[I["bilirubin_total"]], (1.2, 2, 6, 12), below=False)
        + cardiovascular
        + points(gcs, (15, 13, 10, 6), below=True)
        + max(creatinine, 4 if urine < 200 else 3 if urine < 500 else 0)
    )


def by_dose(row, dose):
    if dose > 0:
        return 4 if dose > 0.1 else 3
    return int(row[I["meanbp"]] < 70)


class Scale:
    def __init__(self, scaler):
        self.mean, self.std, self.static_mean, self.static_std = (
            np.asarray(x, np.float64)
            for x in (scaler.mean, scaler.std, scaler.static_mean, scaler.static_std)
        )

    def z(self, row):
        row = np.array(row, np.float64)
        row[38] = np.log1p(row[38])
        return (row - self.mean) / self.std

    def physical(self, z):
        row = z * self.std + self.mean
        row[38] = max(np.expm1(row[38]), 0.0)
        return row


def window(rows, width):
    """The newest `width` of rows (obs, mask, action), zero rows before the first."""
    parts = []
    for kind, size in ((0, 39), (1, 38), (2, 10)):
        out = np.zeros((1, width, size), np.float32)
        for k, row in enumerate(reversed(rows[-width:])):
            if kind < 2:
                out[0, width - 1 - k] = row[kind]
            elif row[2] is not None:
                out[0, width - 1 - k, row[2] // 5] = 1
                out[0, width - 1 - k, 5 + row[2] % 5] = 1
        parts.append(out)
    return parts


transition = jax.jit(lambda world, *window: world.transition(*window))


def play(world, episodes, stay, step, plan, eps, mode):
    """One branch: dict of lists over the steps, mortality and the count of projections."""
    scale = Scale(world.scaler)
    recorded = np.asarray(episodes.dynamic[stay], np.float64)
    static = (np.asarray(episodes.static[stay]) - scale.static_mean) / scale.static_std
    static = static[None].astype(np.float32)
    actions = np.asarray(episodes.action[stay])
    masks = np.asarray(episodes.measured[stay])
    rows = [[scale.z(recorded[t]), masks[t], int(actions[t])] for t in range(step + 1)]
    urine = [recorded[t, 38] for t in range(step + 1)]

    def urine_24h():
        last = urine[-6:]
        return sum(last) * 6 / len(last)

    if mode == "reference":
        score = float(episodes.sofa[stay, step])
    else:
        dose = float(episodes.vasopressor_dose[stay, step - 1]) if step else 0.0
        row = recorded[step]
        score = sofa(row, episodes.ventilated[stay, step], by_dose(row, dose), urine_24h())
    out = {"values": [], "sofa": [], "reward": [], "ventilation": [], "projected": 0}
    for h, action in enumerate(plan):
        rows[-1][2] = int(action)
        obs, mask, act = window(rows, 6)
        mu, log_sigma, logit = (np.asarray(x[0]) for x in transition(world, obs, mask, static, act))
        z = mu + np.exp(log_sigma) * eps[h]
        if mode == "corrected":
            before = z * scale.std + scale.mean  # urine still a logarithm
            low, high = schema.LOW.astype(np.float64), schema.HIGH.astype(np.float64)
            low[38], high[38] = np.log1p(low[38]), np.log1p(high[38])
            after = np.clip(before, low, high)
            after[1] = max(after[1], after[3])  # systolic above mean
            after[2] = min(after[2], after[3])  # diastolic below mean
            out["projected"] += int((np.abs(after - before) > 1e-3 * scale.std).sum())
            z = (after - scale.mean) / scale.std
        row, last = scale.physical(z), scale.physical(rows[-1][0])
        ventilation = 1 / (1 + np.exp(-logit))
        level = action // 5
        before_this = sum(urine[-6:])
        urine.append(row[38])
        if mode == "reference":
            heart = min(4, int(row[I["meanbp"]] < 70) + level)
            new = sofa(row, ventilation > 0.5, heart, before_this)
        else:
            new = sofa(row, ventilation > 0.5, by_dose(row, DOSES[level]), urine_24h())
        reward = -0.125 * (new - score) - 2 * np.tanh(row[I["lactate"]] - last[I["lactate"]])
        reward -= 0.025 if new == score and new > 0 else 0.0
        score = new
        rows.append([z, rows[-1][1], None])
        for name, value in (
            ("values", row), ("sofa", new), ("reward", reward), ("ventilation", ventilation),
        ):  # fmt: skip
            out[name].append(value)
    rows[-1][2] = int(plan[-1])
    obs, mask, act = window(rows, 12)
    logit = float(world.mortality_logit(obs, mask, static, act)[0])
    return {**out, "mortality": 1 / (1 + np.exp(-logit))}
