"""Losses, gradients and advantages beside those of TRL's own trainers."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from policy import qwen3
from policy.qwen3.logprobs import token_logprobs
from policy.testing.tiny_qwen3 import make_tiny
from policy.train.data.packing import Dialogue, pack
from policy.train.losses import PRESETS, Objective, RolloutRows, cross_entropy, surrogate_loss
from policy.train.rl.advantages import group_relative

pytest.importorskip("torch")
REASON = "needs trl: .venv/bin/pip install -c constraints.txt -e '.[parity]'"
trl = pytest.importorskip("trl", reason=REASON)
pytestmark = pytest.mark.parity

TEMPERATURE = 0.8
GROUP, LENGTHS = 3, (4, 9, 6, 11, 3, 7)  # completions of two prompts


@dataclass(frozen=True)
class Samples:
    """Two groups of three completions, some of whose tokens are of a tool reply."""

    prompts: list
    completions: list
    own: list
    sampler_logprobs: list
    rewards: list


@pytest.fixture(scope="module")
def samples():
    draw = np.random.default_rng(0)
    prompts = [[5, 6, 7, 8]] * GROUP + [[9, 10]] * GROUP
    completions = [draw.integers(11, 600, length).tolist() for length in LENGTHS]
    own = [(draw.random(length) < 0.8).astype(int).tolist() for length in LENGTHS]
    sampler_logprobs = [draw.normal(-6.46, 0.3, length).tolist() for length in LENGTHS]
    return Samples(
        prompts, completions, own, sampler_logprobs, draw.normal(size=len(LENGTHS)).tolist()
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The model that an update begins with, the one that it has reached, and a reference."""
    path = tmp_path_factory.mktemp("models")
    return {
        name: make_tiny(path / name, seed=seed, layers=1)
        for seed, name in enumerate(("old_logprobs", "now", "reference"))
    }


@pytest.fixture(scope="module")
def found_here(samples, folders):
    """Rows with everything but advantages, log-probabilities now, and their pull-back."""
    ids = [[*p, *c] for p, c in zip(samples.prompts, samples.completions, strict=True)]
    lengths = np.array([len(one) for one in ids])
    shape = (len(ids), int(lengths.max()))
    own, within = np.zeros(shape, bool), np.arange(shape[1]) < lengths[:, None]
    tokens, sampler_logprobs = np.zeros(shape, np.int32), np.full(shape, np.nan, np.float32)
    for row, one in enumerate(ids):
        tokens[row, : len(one)] = one
        start = len(samples.prompts[row])
        own[row, start : len(one)] = samples.own[row]
        sampler_logprobs[row, start : len(one)] = samples.sampler_logprobs[row]
    positions = np.where(within, np.arange(shape[1]), 0).astype(np.int32)

    @jax.jit
    def logprobs(model):
        return token_logprobs(
            model,
            tokens,
            positions=positions,
            segments=within.astype(np.int32),
            temperature=TEMPERATURE,
        )

    models = {name: qwen3.load(folder) for name, folder in folders.items()}
    old = {
        name: np.asarray(logprobs(models[name]).logprob) for name in ("old_logprobs", "reference")
    }
    rows = RolloutRows(
        ids=tokens,
        positions=positions,
        segments=within.astype(np.int32),
        mask=own,
        sampler_logprobs=sampler_logprobs,
        advantage=np.zeros(shape, np.float32),
        **old,
    )
    now, pull = jax.vjp(logprobs, models["now"])
    return rows, now, jax.jit(pull)


def of_trl(samples, folders, tmp_path, *, corrected=False, **settings):
    """Loss, gradients by name and advantages of a `GRPOTrainer` given these samples."""
    import torch
    from datasets import Dataset
    from transformers import Qwen3ForCausalLM

    config = trl.GRPOConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(LENGTHS),
        gradient_accumulation_steps=1,
        num_generations=GROUP,
        num_iterations=2,  # so that what an update begins with is remembered
        temperature=TEMPERATURE,
        report_to="none",
        use_cpu=True,
        bf16=False,
        vllm_importance_sampling_correction=corrected,
        **settings,
    )
    trainer = trl.GRPOTrainer(
        model=str(folders["old_logprobs"]),
        reward_funcs=lambda completions, **_: samples.rewards,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "unused"}]),
    )
    trainer.use_vllm = corrected  # whether the sampler's log-probabilities are looked at
    trainer.current_gradient_accumulation_steps = 1
    trainer._generate = lambda prompts: (
        samples.prompts,
        samples.completions,
        samples.own,
        ["unused"] * len(LENGTHS),
        samples.sampler_logprobs,
        {},
        None,
        None,
    )
    if trainer.ref_model is not None:
        trainer.ref_model.load_state_dict(_weights(folders["reference"]))
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": "unused"}] * len(LENGTHS))
    trainer.model.load_state_dict(_weights(folders["now"]))
    loss = trainer._compute_loss(trainer.model, inputs)
    loss.backward()
    assert isinstance(trainer.model, Qwen3ForCausalLM) and loss.dtype == torch.float32
    gradients = {name: p.grad.numpy() for name, p in trainer.model.named_parameters()}
    return float(loss.detach()), gradients, inputs["advantages"].numpy()


def _weights(folder):
    from transformers import Qwen3ForCausalLM

    return Qwen3ForCausalLM.from_pretrained(str(folder)).state_dict()


def _as_hf(gradient, folder):
    """Gradients by the names of transformers."""
    (model,) = gradient
    graphdef, state = nnx.split(model)
    qwen3.save_hf(nnx.merge(graphdef, state), folder)
    return load_file(folder / "model.safetensors")


NONE = {"correction": "none"}
SETTINGS = {
    "grpo": (
        {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": False},
        replace(PRESETS["GRPO"], **NONE),
    ),
    "dr_grpo, two-sided": (
        {
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "max_completion_length": 16,
            "delta": 1.3,
        },
        replace(PRESETS["DR_GRPO"], constant_length=16, dual_clip=1.3, **NONE),
    ),
    "dapo, entropy": (
        {
            "loss_type": "dapo",
            "epsilon_high": 0.28,
            "beta": 0.1,
            "use_bias_correction_kl": True,
            "entropy_coef": 0.05,
        },
        replace(PRESETS["DAPO"], beta=0.1, use_bias_correction_kl=True, entropy_coef=0.05, **NONE),
    ),
    "bnpo": ({"loss_type": "bnpo"}, Objective(**NONE)),
    "gspo": (
        {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 0.02,
            "epsilon_high": 0.03,
        },
        replace(PRESETS["GSPO"], epsilon_low=0.02, epsilon_high=0.03, **NONE),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.2},
        replace(PRESETS["CISPO"], epsilon_high=0.2, **NONE),
    ),
}
for mode, level, correction in (
    ("token_truncate", "token", "truncate"),
    ("token_mask", "token", "mask"),
    ("sequence_truncate", "sequence", "truncate"),
    ("sequence_mask", "sequence", "mask"),
):
    bounds = {"vllm_importance_sampling_clip_max": 1.25}
    if correction == "mask":
        bounds["vllm_importance_sampling_clip_min"] = 0.75
    SETTINGS[mode] = (
        {
            "loss_type": "dapo",
            "beta": 0.1,
            "use_bias_correction_kl": True,
            "corrected": True,
            "vllm_importance_sampling_mode": mode,
            **bounds,
        },
        Objective(
            beta=0.1,
            use_bias_correction_kl=True,
            correction=correction,
            correction_level=level,
            correction_low=0.75,
            correction_cap=1.25,
        ),
    )


@pytest.mark.parametrize("case", SETTINGS)
def test_beside_grpo_trainer(case, samples, folders, found_here, tmp_path):
    settings, objective = SETTINGS[case]
    expected, gradients, advantages = of_trl(samples, folders, tmp_path, **settings)
    scale = settings.get("scale_rewards") != "none"
    found = group_relative(np.array(samples.rewards), [0] * GROUP + [1] * GROUP, scale=scale)
    np.testing.assert_allclose(found, advantages, atol=1e-5)

    rows, now, pull = found_here
    rows = rows._replace(advantage=np.where(rows.mask, found[:, None], np.nan))

    @partial(jax.grad, has_aux=True)
    def solve(now):
        summed = surrogate_loss(now.logprob, now.entropy, rows, objective)
        return summed.total / summed.weight, summed

    cotangent, summed = solve(now)
    loss = float(summed.total / summed.weight)
    assert loss == pytest.approx(expected, abs=1e-5)
    by_name = _as_hf(pull(cotangent), tmp_path / "gradient")
    assert sorted(by_name) == sorted(gradients)
    for name, expected_gradient in gradients.items():
        np.testing.assert_allclose(
            by_name[name],
            expected_gradient,
            atol=1e-5 * np.abs(expected_gradient).max() + 1e-7,
            err_msg=name,
        )
    # The case does what it is there for: some bound holds somewhere, and not everywhere.
    bound = {"truncate": "corrected", "mask": "masked"}.get(objective.correction, "clip_ratio/high")
    assert 0 < float(summed.metrics[bound] / summed.weight) < 1


def test_beside_sft_trainer(samples, folders, tmp_path):
    from datasets import Dataset

    dialogues, records = [], []
    for prompt, completion, own in zip(
        samples.prompts, samples.completions, samples.own, strict=True
    ):
        mask = [0] * len(prompt) + own
        ids = [*prompt, *completion]
        dialogues.append(Dialogue(np.array(ids, np.int32), np.array(mask, bool)))
        records.append({"input_ids": ids, "completion_mask": mask})
    config = trl.SFTConfig(
        output_dir=str(tmp_path / "trl"),
        per_device_train_batch_size=len(records),
        completion_only_loss=True,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model=str(folders["now"]), args=config, train_dataset=Dataset.from_list(records)
    )
    (batch,) = trainer.get_train_dataloader()
    expected = float(trainer.compute_loss(trainer.model, batch).detach())
    rows = pack(dialogues, 32, seed=0)
    found = jax.jit(cross_entropy)(qwen3.load(folders["now"]), rows)
    assert float(found.weight) == sum(map(sum, samples.own))
    assert float(found.total / found.weight) == pytest.approx(expected, abs=1e-5)
