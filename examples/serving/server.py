"""vLLM's OpenAI server with two adapters, and a client that asks both and the base model at the same time.

    python examples/serving/server.py

The server runs on loopback and is stopped when the client is done. To leave one running:

    vllm serve MODEL --additional-config '{"reft_adapters": {"pleased": "FOLDER/pleased"}}'
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from moods import save_moods
from smollm2 import smollm2_folder

QUESTION = "How was your holiday?"


@contextmanager
def serving(model: str, adapters: dict[str, str]) -> Iterator[str]:
    """A server within the `with` block; yields its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments = ["--model", model, "--served-model-name", "base", "--host", "127.0.0.1", "--port", str(port)]
    arguments += ["--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    arguments += ["--kv-cache-memory-bytes", str(256 << 20), "--block-size", "32"]
    arguments += ["--additional-config", json.dumps({"reft_adapters": adapters})]
    environment = {"VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1"} | os.environ
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments], env=environment
    )
    address = f"http://127.0.0.1:{port}"
    try:
        while not is_up(address):
            if process.poll() is not None:
                raise SystemExit("The server did not start; see its messages above.")
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait()


def is_up(address: str) -> bool:
    try:
        with urllib.request.urlopen(f"{address}/health"):
            return True
    except OSError:
        return False


def send(address: str, path: str, **body: Any) -> Any:
    """The server's answer; a GET request without a body."""
    data = json.dumps(body).encode() if body else None
    request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as response:
        return json.load(response)


def ask(address: str, **names: Any) -> str:
    messages = [{"role": "user", "content": QUESTION}]
    options = {"max_tokens": 40, "temperature": 0, "repetition_penalty": 1.1}
    answer = send(address, "/v1/chat/completions", messages=messages, **options, **names)
    return " ".join(answer["choices"][0]["message"]["content"].split())


def main() -> None:
    model = str(smollm2_folder())
    with TemporaryDirectory() as folder, serving(model, save_moods(model, folder)) as address:
        print("models:", ", ".join(card["id"] for card in send(address, "/v1/models")["data"]))
        asked = [
            {"model": "base"},
            {"model": "pleased"},
            {"model": "displeased"},
            {"model": "base", "reft": {"name": "pleased", "strength": 0.5}},
        ]
        with ThreadPoolExecutor(len(asked)) as pool:
            for names, text in zip(asked, pool.map(lambda names: ask(address, **names), asked), strict=True):
                print(f"\n{json.dumps(names)}\n  {text}")


if __name__ == "__main__":
    main()
