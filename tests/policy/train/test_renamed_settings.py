"""Earlier names of settings are refused with the name that they have now."""

import pytest
import yaml

from policy.ppo import PPOConfig
from sepsis_jax.pipelines.llm.stages import StagesOptions
from worldmodel.configuration import apply_overrides, from_mapping
from worldmodel.errors import InputError

RENAMED = {
    "rl.agentic.replicas": "num_generations",
    "rl.agentic.updates": "num_minibatches",
    "rl.agentic.rows": "micro_batch_size",
    "rl.agentic.credit.kind": "advantages",
    "rl.agentic.objective.clip_high": "epsilon_high",
    "rl.agentic.objective.kl_weight": "beta",
    "rl.agentic.objective.surrogate": "loss_type",
    "rl.learner.steps": "max_steps",
    "rl.learner.warm_up": "warmup_steps",
    "rl.learner.beta2": "adam_beta2",
    "rl.learner.clip_norm": "max_grad_norm",
    "rl.judge_every": "eval_steps",
    "rl.clinic.dialogue.max_invalid": "runner",
    "rl.runner.dialogue.sampling.max_new_tokens": "max_completion_length",
    "sft.training.rows": "micro_batch_size",
    "sft.training.learner.accumulate": "gradient_accumulation_steps",
    "bc.teacher": "demonstrator",
    "exam.patients": "evaluation",
    "rivals": "baselines",
}


@pytest.mark.parametrize("path", RENAMED)
def test_an_earlier_name_is_refused_with_the_current_one(path):
    *_, old = [name for name in path.split(".") if f"{name}: renamed" in refusal(path)]
    expected = f"{old}: renamed, now {RENAMED[path]}"
    assert refusal(path).endswith(expected) and "\n" not in refusal(path)
    with pytest.raises(InputError, match=expected):
        from_mapping(StagesOptions, yaml.safe_load(nested(path.split("."))), source="file.yaml")


def refusal(path):
    with pytest.raises(InputError) as refused:
        apply_overrides(StagesOptions(), [f"{path}=1"], source="--set")
    return str(refused.value)


def nested(names):
    return ": {".join(names) + ": 1" + "}" * (len(names) - 1)


def test_settings_of_the_online_policy():
    with pytest.raises(InputError, match="clip_norm: renamed, now max_grad_norm"):
        from_mapping(PPOConfig, {"clip_norm": 1.0}, source="policy.json")
