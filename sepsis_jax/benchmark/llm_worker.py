"""One contender of `sepsis-jax bench llm`, in a process of its own; run by its path.

vLLM's environment has neither JAX nor this package, and what torch leaves in memory or in its
threads must not count for JAX, so a contender imports what it needs only when it is chosen. Every
line on standard input is the number of a repeat; every line on standard output is JSON.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

Task = dict[str, int]
Ids = list[int]
Sampler = Callable[[list[Ids], int], list[Ids]]
"""Draws so many new tokens after each prompt."""


def drawn(task: Task, repeat: int) -> list[Ids]:
    """Token ids [rows][length], others in every repeat, so that no cache has them already."""
    source = random.Random(task["seed"] * 1000 + repeat)
    return [source.choices(range(task["vocab"]), k=task["length"]) for _ in range(task["rows"])]


def dialogues(sample: Sampler, task: Task, repeat: int) -> None:
    """Rows of dialogues: `length` tokens are said, `new` are drawn, and so on for all turns."""
    read: list[Ids] = [[] for _ in range(task["rows"])]
    for turn in range(task["turns"]):
        said = drawn(task, task["turns"] * (repeat + 1) + turn)
        read = [before + more for before, more in zip(read, said, strict=True)]
        replies = sample(read, task["new"])
        assert all(len(reply) == task["new"] for reply in replies)
        read = [before + reply for before, reply in zip(read, replies, strict=True)]


def embedded(folder: str, task: Task) -> Sampler:
    """The sampler of this package."""
    from policy.qwen3 import load
    from policy.qwen3.prefix_cache import PrefixCache, rows_kept
    from policy.qwen3.sampler import Draw, generate, layers_apart

    model = load(folder)
    layers = layers_apart(model)
    prefixes = PrefixCache(rows_kept(task["rows"])) if task["turns"] > 1 else None

    def sample(prompts: list[Ids], new: int) -> list[Ids]:
        draws = [
            Draw(tuple(prompt), seed=row, max_completion_length=new)
            for row, prompt in enumerate(prompts)
        ]
        found = generate(model, draws, prefixes=prefixes, layers=layers)
        return [list(one.token_ids) for one in found]

    return sample


def transformers(folder: str, task: Task) -> Sampler:
    """`generate` of transformers, with its cache of keys and values."""
    torch, models = import_module("torch"), import_module("transformers")
    model = models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def sample(prompts: list[Ids], new: int) -> list[Ids]:
        ids = torch.tensor(prompts)
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, top_k=0, top_p=1.0,
            min_new_tokens=new, max_new_tokens=new, pad_token_id=0,
        )  # fmt: skip
        replies: list[Ids] = found[:, ids.shape[1] :].tolist()
        return replies

    return sample


def vllm(folder: str, task: Task) -> Sampler:
    """The engine of vLLM in this process, with its prefix cache."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    package = import_module("vllm")
    longest = task["turns"] * (task["length"] + task["new"])
    engine = package.LLM(
        folder, skip_tokenizer_init=True, dtype="float32", max_model_len=longest,
        max_num_seqs=task["rows"], max_num_batched_tokens=max(longest, 8192), enforce_eager=True,
    )  # fmt: skip

    def sample(prompts: list[Ids], new: int) -> list[Ids]:
        wanted = package.SamplingParams(
            temperature=1.0, max_tokens=new, ignore_eos=True, detokenize=False
        )
        asked = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = engine.generate(asked, wanted, use_tqdm=False)
        return [list(one.outputs[0].token_ids) for one in found]

    return sample


def learner(folder: str, task: Task) -> Callable[[list[Ids]], float]:
    """The learner of this package, with default settings."""
    import numpy as np

    from policy.qwen3 import load
    from policy.train.data.packing import Rows
    from policy.train.loop.learner import Learner
    from policy.train.loop.optimizer import LearnerConfig
    from policy.train.losses import cross_entropy

    made = Learner(load(folder), cross_entropy, LearnerConfig(warmup_steps=0))

    def update(rows: list[Ids]) -> float:
        summed, _ = made.update(Rows.full(np.array([rows], np.int32)))
        return float(summed.total / summed.weight)

    return update


def torch(folder: str, task: Task) -> Callable[[list[Ids]], float]:
    """A plain loop over transformers' model."""
    torch, models = import_module("torch"), import_module("transformers")
    model = models.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, betas=(0.9, 0.95), weight_decay=0.01)

    def update(rows: list[Ids]) -> float:
        ids = torch.tensor(rows)
        optimizer.zero_grad()
        logits = model(ids).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return float(loss)

    return update


SAMPLERS = {"embedded": embedded, "transformers": transformers, "vLLM": vllm}
LEARNERS = {"learner": learner, "torch": torch}


def prepared(name: str, folder: str, task: Task) -> Callable[[int], float | None]:
    """What a contender does in one repeat; a learner returns its loss."""
    if name in SAMPLERS:
        sample = SAMPLERS[name](folder, task)
        return lambda repeat: dialogues(sample, task, repeat)
    update = LEARNERS[name](folder, task)
    return lambda repeat: update(drawn(task, repeat))


def most_memory() -> int:
    """Most bytes that this process had in memory; what its parent had does not count."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None  # on Linux
    return 1024 * int(found.group(1))


def main() -> None:
    """Answers until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # engines write to standard output
    name, folder, task = sys.argv[1:]
    run = prepared(name, folder, json.loads(task))
    for line in sys.stdin:
        began, worked = time.perf_counter(), time.process_time()
        loss = run(int(line))
        answer = {
            "seconds": time.perf_counter() - began,
            "processor_seconds": time.process_time() - worked,
            "memory_bytes": most_memory(),
            "loss": loss,
        }
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
