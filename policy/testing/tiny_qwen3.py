"""Tiny random Qwen3 and Llama folders with tokenizers: for tests and demos, without a network.

What they say means nothing; everything that handles a real model handles them alike.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from policy.qwen3.config import Qwen3Config, RopeScaling
from policy.qwen3.model import Qwen3
from policy.qwen3.weights import save_hf
from worldmodel.files import write_json

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MARKUP_TOKENS = (  # kept in decoded text, as parsers of tool calls and reasoning want
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
HEAD_DIM = 64  # the smallest that vLLM's CPU attention takes

CHAT_TEMPLATE = """\
{%- set calls_help -%}
Functions you may call, one JSON object per line:
{%- endset -%}
{%- set first = messages[0] if messages and messages[0].role == 'system' else none -%}
{%- if first or tools -%}
{{- '<|im_start|>system\\n' -}}
{%- if first -%}{{- first.content -}}{%- endif -%}
{%- if tools -%}
{{- ('\\n\\n' if first else '') + calls_help + '\\n' -}}
{%- for tool in tools -%}{{- tool | tojson + '\\n' -}}{%- endfor -%}
{{- 'Write each call as one JSON object between tags:\\n' -}}
{{- '<tool_call>\\n{"name": NAME, "arguments": OBJECT}\\n</tool_call>' -}}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'tool' -%}
{%- if loop.first or loop.previtem.role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\\n<tool_response>\\n' + message.content + '\\n</tool_response>' -}}
{%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + (message.content or '') -}}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{%- set arguments = function.arguments -%}
{{- '\\n' if message.content or not loop.first else '' -}}
{{- '<tool_call>\\n{"name": ' + function.name | tojson + ', "arguments": ' -}}
{{- arguments if arguments is string else arguments | tojson -}}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- elif not (message.role == 'system' and loop.first) -%}
{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
"""ChatML with tools as JSON in the system turn, calls and replies between tags."""

BRIEF_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "tool | tojson",
    "tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')'",
)
"""The same with tools by name and parameters alone."""


def make_tiny(
    path: str | Path,
    *,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 640,
    tied: bool = True,
    rope_theta: float = 1e6,
    initializer_range: float = 0.02,
    dtype: DTypeLike = "float32",
    texts: Iterable[str] | None = None,
    brief: bool = False,
    model_type: str = "qwen3",
    rope_scaling: RopeScaling | None = None,
    attention_bias: bool = False,
) -> Path:
    """Writes a random Qwen3 or Llama as a Hugging Face folder, with tokenizer and chat template.

    Args:
      path: folder to make; an older model there is replaced.
      seed: of the weights; the tokenizer is always the same.
      layers, hidden, heads, kv_heads: the architecture; heads are 64 wide.
      vocab: rows of the embeddings, at least 300. The tokenizer has as many tokens up to about
        690; further ids decode to nothing, like the spare rows of the real ones.
      tied: whether the output projection is the embedding.
      rope_theta: base of the rotary positions.
      initializer_range: standard deviation of the weights; larger makes sharper distributions.
      dtype: of the weights.
      texts: whose frequent phrases become single tokens, digits apart, so that such texts are
        short; if not given, the tokenizer learns words from generated text, as real ones do.
      brief: the chat template shows tools by name and parameters, not by their whole schemas,
        which would be most of a short context.
      model_type, rope_scaling, attention_bias: as in `Qwen3Config`.
    """
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_DIM,
        rope_theta=rope_theta,
        tie_word_embeddings=tied,
        max_position_embeddings=32768,
        initializer_range=initializer_range,
        bos_token_id=0,
        eos_token_id=2,
        model_type=model_type,
        rope_scaling=rope_scaling,
        attention_bias=attention_bias,
    )
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Qwen3(config, param_dtype=dtype, rngs=nnx.Rngs(0)))
    )
    draw = np.random.default_rng(seed)  # NumPy's: nothing to compile, equal on every machine
    values = []
    for key, variable in nnx.to_flat_state(state):
        norm = key[-1] == "scale"
        value = np.ones(variable.shape) if norm else draw.standard_normal(variable.shape)
        value = value if norm else initializer_range * value
        values.append((key, variable.replace(jnp.asarray(value, variable.dtype))))
    model = nnx.merge(graphdef, nnx.from_flat_state(values))
    with tempfile.TemporaryDirectory() as tokenizer:
        save_tokenizer(Path(tokenizer), vocab=vocab, texts=texts, brief=brief)
        return save_hf(model, path, source=tokenizer)


def save_tokenizer(
    folder: Path, *, vocab: int, texts: Iterable[str] | None = None, brief: bool = False
) -> None:
    """Writes a byte-level BPE tokenizer trained on texts, as transformers loads it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=texts is None),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[*SPECIAL_TOKENS, *MARKUP_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_text() if texts is None else texts, trainer)
    contents = json.loads(tokenizer.to_str())
    for token in contents["added_tokens"]:  # the trainer makes all of them special
        token["special"] = token["content"] in SPECIAL_TOKENS
    write_json(folder / "tokenizer.json", contents)
    end_of_text, _, end_of_turn = SPECIAL_TOKENS
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": None,
            "eos_token": end_of_turn,
            "pad_token": end_of_text,
            "chat_template": BRIEF_CHAT_TEMPLATE if brief else CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": 0,
            "eos_token_id": [2, 0],
            "pad_token_id": 0,
            "do_sample": True,
            "temperature": 0.7,
            "top_p": 0.95,
        },
    )


_SIGNS = (
    ("heart rate", "/min"),
    ("mean blood pressure", "mmHg"),
    ("systolic blood pressure", "mmHg"),
    ("respiratory rate", "/min"),
    ("oxygen saturation", "%"),
    ("temperature", "degrees Celsius"),
    ("urine output", "mL"),
    ("lactate", "mmol/L"),
    ("creatinine", "mg/dL"),
    ("bilirubin", "mg/dL"),
    ("platelets", "K/uL"),
    ("white blood cells", "K/uL"),
    ("PaO2/FiO2", "mmHg"),
    ("arterial pH", ""),
    ("bicarbonate", "mEq/L"),
    ("SOFA score", ""),
    ("Glasgow Coma Scale", ""),
)
_PHRASES = (
    "The patient is in the intensive care unit with sepsis.",
    "Sepsis-3: suspected infection and organ dysfunction.",
    "The last four hours show that perfusion is better and the shock is milder.",
    "The intravenous fluid dose and the vasopressor dose go from level 0 to level 4.",
    "Compare the predicted outcome of several treatments before the final answer.",
    "Mechanical ventilation: yes. Renal function is worse, mortality risk is higher.",
    "norepinephrine mcg/kg/min, crystalloid mL per 4 hours, age, weight, gender",
    "I simulate this option first, then I decide. Therefore the best option is",
)


def _text() -> Iterator[str]:
    draw = random.Random(0)
    for _ in range(400):
        name, unit = draw.choice(_SIGNS)
        yield f"- {name}: {draw.uniform(0, 200):.1f} {unit} ({draw.choice(('rising', 'falling'))})"
        yield draw.choice(_PHRASES)
        arguments = {"vasopressor": draw.randrange(5), "iv_fluid": draw.randrange(5)}
        tool = draw.choice(("simulate_treatment", "submit_treatment"))
        call = {"name": tool, "arguments": arguments}
        yield f"\n{json.dumps(call)}\n"
        yield f"system user assistant tool\nHour {draw.randrange(72)}: {json.dumps(arguments)}"
        schema = {"type": "integer", "minimum": 0, "maximum": 4, "description": tool}
        yield json.dumps({"type": "function", "function": call | {"parameters": schema}})
