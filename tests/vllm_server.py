"""vLLM's OpenAI server for tests."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

# `SMALL` on the command line.
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", str(32 << 20)]
OPTIONS += ["--block-size", "32", "--max-model-len", "256"]


class Server:
    """vLLM's OpenAI server on loopback, in a new process."""

    def __init__(self, model: Path, config: dict, log: Path, *arguments: str, **environment: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
        command += [
            "--host",
            "127.0.0.1",
            "--port",
            str(self.port),
            "--served-model-name",
            "base",
            *OPTIONS,
            *arguments,
        ]
        environment = (
            os.environ | environment | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        )
        self.log = log.open("w")
        self.process = subprocess.Popen(
            [*command, "--additional-config", json.dumps(config)], env=environment, stdout=self.log, stderr=self.log
        )
        deadline = time.monotonic() + 240
        while not self._is_up():
            assert self.process.poll() is None, log.read_text()[-3000:]
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)

    def _is_up(self) -> bool:
        try:
            return self.get("/health")[0] == 200
        except OSError:
            return False

    def get(self, path: str) -> tuple[int, Any]:
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}"))

    def post(self, path: str, **body: Any) -> tuple[int, Any]:
        data, header = json.dumps(body).encode(), {"Content-Type": "application/json"}
        return self._send(urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", data, header))

    def _send(self, request: urllib.request.Request) -> tuple[int, Any]:
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, text = response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read().decode()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)
        self.log.close()
