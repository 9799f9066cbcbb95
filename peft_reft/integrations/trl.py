"""TRL's `use_vllm=True`: vLLM gets the adapter itself at each step, instead of weights that TRL merged it into.

An edit of some tokens cannot be merged. Create the trainer in a `with` block:

    from peft_reft.integrations.trl import vllm_rollouts

    with vllm_rollouts():
        trainer = GRPOTrainer(model, rewards, GRPOConfig(use_vllm=True), data, peft_config=ReftConfig(r=4))
    trainer.train()
"""

from __future__ import annotations

import atexit
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from peft import PeftModel
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.import_utils import is_vllm_available

from peft_reft.config import ReftConfig
from peft_reft.integrations.vllm.adapters import Adapter
from peft_reft.integrations.vllm.settings import ADAPTERS, REQUEST, TARGETS
from peft_reft.layer import layers

_SERVER = (
    f'Start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment and --additional-config \'{{"{ADAPTERS}": '
    "{}}' (reft_components beside it, for an adapter with another component than block_output)."
)


@contextmanager
def vllm_rollouts(**engine_args: Any) -> Iterator[None]:
    """Have trainers created in this block generate with the unmerged adapter. Mutates TRL's class within the block.

    Works with TRL's trainers that generate with `VLLMGeneration` (GRPO, RLOO), with both values of `vllm_mode`. For
    models without a ReFT adapter nothing changes.

    **The base model's weights are not sent**: nothing trains them, and vLLM has loaded them from `model.name_or_path`.
    If you changed a model in memory, for example by merging a LoRA, save it and load it from there. TRL logs the
    difference between the completions' log-probabilities and the trained model's as
    `sampling/sampling_logp_difference`.

    With `vllm_mode="colocate"` the engine is started in eager mode. With `vllm_mode="server"` start the server with
    `--additional-config '{"reft_adapters": {}}'`, with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, and, as
    for any training, with VLLM_SERVER_DEV_MODE=1 and `--logprobs-mode processed_logprobs`.

    Args:
        engine_args: arguments of vLLM's `EngineArgs` that TRL has no option for, such as `dtype`; only for
            `vllm_mode="colocate"`.

    Raises:
        RuntimeError: this version of TRL starts vLLM differently from 1.16.
        ValueError: raised by the trainer if it has several active adapters, FSDP, DeepSpeed ZeRO-3,
            `vllm_enable_sleep_mode`, or trained modules outside of the layers (see `Adapter.of`).
    """
    original = getattr(VLLMGeneration, "_init_vllm", None)
    if original is None or not hasattr(VLLMGeneration, "sync_weights"):
        raise RuntimeError("This TRL starts vLLM differently from TRL 1.16, the version that peft_reft supports.")

    def start(self: VLLMGeneration) -> None:
        if _has_reft(self.model) and is_vllm_available():
            self.__class__ = AdapterGeneration
            self.start(original, engine_args)
        else:
            original(self)

    VLLMGeneration._init_vllm = start
    try:
        yield
    finally:
        VLLMGeneration._init_vllm = original


def _has_reft(model: Any) -> bool:
    return isinstance(model, PeftModel) and any(
        isinstance(model.peft_config[name], ReftConfig) for name in model.active_adapters
    )


class AdapterGeneration(VLLMGeneration):
    """TRL's generation with vLLM, for a model with a ReFT adapter.

    Attributes:
        served_name: name of the adapter in the engine.
    """

    served_name: str

    def start(self, original: Callable[[VLLMGeneration], None], engine_args: dict[str, Any]) -> None:
        """Start the engine or find the server, in place of TRL's `original`.

        Args:
            original: TRL's `VLLMGeneration._init_vllm`.
            engine_args: see `vllm_rollouts`.

        Raises:
            ValueError: see `vllm_rollouts`.
        """
        self._refuse(engine_args)
        # Unique among the trainings that use the same server.
        self.served_name = f"reft-{secrets.token_hex(4)}"
        self._given_arguments = self.generation_kwargs
        if self.mode == "server":
            self._find_server()
        else:
            from peft_reft.integrations.vllm.plugin import engine_arguments

            targets = sorted({f"{place.module} {place.side}" for place in self._adapter().places})
            config = {**engine_args.get("additional_config", {}), ADAPTERS: {}, TARGETS: targets}
            with engine_arguments(**{"enforce_eager": True, **engine_args, "additional_config": config}):
                original(self)

    def _refuse(self, engine_args: dict[str, Any]) -> None:
        obstacles = {
            "FSDP": self._dist.is_fsdp,
            "DeepSpeed ZeRO-3": self._dist.is_zero3,
            "vllm_enable_sleep_mode=True": self.enable_sleep_mode,
            f"{len(self.model.active_adapters)} active adapters": len(self.model.active_adapters) > 1,
            f"vllm_mode='server' and arguments of an engine ({', '.join(engine_args)})": (
                self.mode == "server" and bool(engine_args)
            ),
        }
        for obstacle, present in obstacles.items():
            if present:
                raise ValueError(f"use_vllm=True with a ReFT adapter does not work with {obstacle}. Leave it out.")

    def _find_server(self) -> None:
        if self.accelerator.is_main_process:
            url = self.server_base_url or f"http://{self.server_host}:{self.server_port}"
            # No communicator for weights, which would need a GPU.
            self.vllm_client = VLLMClient(base_url=url, connection_timeout=self.server_timeout)
            atexit.register(_leave_server, self.vllm_client.base_url, self.served_name)
        self.accelerator.wait_for_everyone()

    def sync_weights(self) -> None:
        """Send the current adapter. TRL calls this when a step has changed it.

        Raises:
            RuntimeError: the server refused the adapter.
        """
        adapter = self._adapter()
        asked = {REQUEST: {"name": self.served_name, "strength": self._strength()}}
        if self.mode == "server":
            if self.accelerator.is_main_process:
                self._send(adapter)
            self.generation_kwargs = {**self._given_arguments, **asked}
        else:
            from peft_reft.integrations.vllm import add_adapter

            add_adapter(self.llm, self.served_name, adapter)
            extra = {**self._given_arguments.get("extra_args", {}), **asked}
            self.generation_kwargs = {**self._given_arguments, "extra_args": extra}

    def generate(self, prompts: list, images: list | None, *args: Any, **kwargs: Any) -> tuple:
        """Like TRL's `generate`, for text only.

        Raises:
            ValueError: there are images.
        """
        if images is not None and any(image is not None for image in images):
            raise ValueError("use_vllm=True with a ReFT adapter does not take images.")
        return super().generate(prompts, images, *args, **kwargs)

    @torch.no_grad()
    def _adapter(self) -> Adapter:
        return Adapter.of_model(self.model, self.model.active_adapter)

    def _strength(self) -> float:
        """The adapter's strength in the model, which training uses too."""
        settings = (layer.reft_settings.get(self.model.active_adapter) for layer in layers(self.model))
        return next(own.strength for own in settings if own is not None)

    def _send(self, adapter: Adapter) -> None:
        body = {"lora_name": self.served_name, "lora_path": adapter.to_url(), "load_inplace": True}
        url = f"{self.vllm_client.base_url}/v1/load_lora_adapter"
        answer = self.vllm_client.session.post(url, json=body)
        if answer.status_code != 200:
            raise RuntimeError(
                f"The vLLM server at {self.vllm_client.base_url} did not take the ReFT adapter ({answer.status_code}: "
                f"{answer.text[:500]}). {_SERVER}"
            )


def _leave_server(address: str, name: str) -> None:
    import requests

    with suppress(OSError):  # the server may have stopped before
        requests.post(f"{address}/v1/unload_lora_adapter", json={"lora_name": name}, timeout=5)
