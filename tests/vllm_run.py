"""One engine in a new process: reads its task from a file, and writes its answers beside it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace


def second_model_runner() -> None:
    """Have vLLM take its second model runner on a CPU: its kernels run in Triton's interpreter, slowly."""
    os.environ |= {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": "1"}
    import triton.backends

    driver = SimpleNamespace(is_active=lambda: True)
    triton.backends.backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


def main(path: Path) -> None:
    task = json.loads(path.read_text())
    if task["second"]:
        second_model_runner()
    import vllm
    from serving import Request, answers

    llm = vllm.LLM(**task["engine"])
    assert llm.llm_engine.vllm_config.use_v2_model_runner == task["second"]
    rounds = []
    for requests in task["rounds"]:
        given = answers(llm, [Request(tuple(ids), name, strength) for ids, name, strength in requests], task["tokens"])
        rounds.append([(answer.tokens, [list(one.items()) for one in answer.logprobs]) for answer in given])
    path.with_suffix(".answers").write_text(json.dumps(rounds))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
