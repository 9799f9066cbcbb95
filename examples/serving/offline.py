"""Two adapters and the base model in one batch of vLLM's `LLM`, and an adapter added while the engine runs.

python examples/serving/offline.py
"""

from __future__ import annotations

import os
from tempfile import TemporaryDirectory

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import vllm
from moods import save_moods
from smollm2 import smollm2_folder

from peft_reft.integrations.vllm import add_adapter

PROMPT = "I watched the film last night and"


def main() -> None:
    model = str(smollm2_folder())
    with TemporaryDirectory() as folder:
        moods = save_moods(model, folder)
        llm = vllm.LLM(
            model,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=256 << 20,
            block_size=32,
            max_model_len=512,
            additional_config={"reft_adapters": {"pleased": moods["pleased"]}},
        )
        add_adapter(llm, "displeased", moods["displeased"])
        asked = [None, "pleased", "displeased", {"name": "pleased", "strength": 0.5}]
        params = [
            vllm.SamplingParams(
                max_tokens=24, temperature=0, repetition_penalty=1.1, extra_args={"reft": one} if one else None
            )
            for one in asked
        ]
        for one, output in zip(asked, llm.generate([PROMPT] * len(asked), params, use_tqdm=False), strict=True):
            print(f"{one or 'base model'!s:>36}: {PROMPT}{' '.join(output.outputs[0].text.split())!r}")


if __name__ == "__main__":
    main()
