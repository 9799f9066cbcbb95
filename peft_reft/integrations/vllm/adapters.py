"""Adapters for an engine: read from a folder or the hub, checked against the model, identified by their contents."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import safetensors.torch
import torch
from peft import PeftConfig, PeftModel
from peft.utils import get_peft_model_state_dict, load_peft_weights

from peft_reft.components import INPUT, OUTPUT
from peft_reft.config import ReftConfig
from peft_reft.interventions import INTERVENTIONS, Intervention
from peft_reft.layer import layers
from peft_reft.tokens.positions import Positions, parse

_KEY = re.compile(
    r"base_model\.model\.(?P<blocks>(?:\w+\.)*?\w+)\.(?P<layer>\d+)(?:\.(?P<module>.+?))?"
    r"\.(?P<child>reft|input_reft)\.reft_intervention\.(?P<parameter>\w+)"
)
# RFC 2397: the settings are a parameter of the type.
_URL = "data:application/x-safetensors;reft="
_SIDES = {"reft": OUTPUT, "input_reft": INPUT}


class Place(NamedTuple):
    """An edited place: a layer's number, the dotted name of a module in it (empty for the layer itself), its side."""

    layer: int
    module: str
    side: str

    def __str__(self) -> str:
        return f"{self.layer}.{self.module or 'block'}.{self.side}"


@dataclass(frozen=True)
class Adapter:
    """An adapter without a model.

    Attributes:
        intervention, act_fn, positions, share_weights: as in `ReftConfig`.
        tensors: its parameters under the names that PEFT saves them with.
        base_model: the model that it was trained on, if its configuration names one.
    """

    intervention: str
    act_fn: str | None
    positions: str
    share_weights: bool
    tensors: Mapping[str, torch.Tensor]
    base_model: str | None = None

    @classmethod
    def load(cls, source: str) -> Adapter:
        """Read an adapter from a folder, the hub, or `to_url`.

        Raises:
            ValueError: the source holds no ReFT adapter, or one that an engine cannot serve.
        """
        if cls.is_url(source):
            return cls._from_url(source)
        try:
            config = PeftConfig.from_pretrained(source)
            tensors = load_peft_weights(source, device="cpu")
        except Exception as error:
            # PEFT, the hub and safetensors raise many kinds of errors for a folder that is missing or broken.
            raise ValueError(f"The adapter {source!r} cannot be read: {type(error).__name__}: {error}") from error
        if not isinstance(config, ReftConfig):
            raise ValueError(f"{source!r} holds a {config.peft_type} adapter, not a ReFT adapter.")
        return cls.of(config, tensors, source)

    @staticmethod
    def is_url(source: str) -> bool:
        """Whether a source contains the adapter itself, see `to_url`."""
        return source.startswith(_URL)

    @classmethod
    def _from_url(cls, url: str) -> Adapter:
        settings, _, tensors = url.removeprefix(_URL).partition(";base64,")
        try:
            given = json.loads(unquote(settings))
            return cls.of(ReftConfig(**given), safetensors.torch.load(base64.b64decode(tensors, validate=True)))
        except Exception as error:
            raise ValueError(f"The adapter in {url[:80]!r}... is broken: {type(error).__name__}: {error}") from error

    @classmethod
    def of(cls, config: ReftConfig, tensors: Mapping[str, torch.Tensor], source: str = "the adapter") -> Adapter:
        """The adapter with this config and these parameters.

        Args:
            config: the configuration.
            tensors: the parameters, under the names that PEFT saves them with.
            source: its name in messages.

        Raises:
            ValueError: it trains more than interventions in the layers.
        """
        for option in ("modules_to_save", "trainable_token_indices"):
            if getattr(config, option):
                raise ValueError(
                    f"{source!r} has {option}={getattr(config, option)!r}: vLLM serves one base model for all "
                    f"adapters, so it cannot take modules from one of them. Train without {option}."
                )
        strange = [name for name in tensors if _KEY.fullmatch(name) is None]
        if strange or not tensors:
            example = strange[0] if strange else "no tensor at all"
            raise ValueError(
                f"{source!r} holds {example}, which belongs to no intervention in a numbered layer of the model. vLLM "
                "serves edits of layers (component) and of modules in them (target_modules)."
            )
        contents = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        return cls(
            config.intervention,
            config.act_fn,
            config.positions,
            config.share_weights,
            contents,
            config.base_model_name_or_path,
        )

    @classmethod
    def of_model(cls, model: PeftModel, adapter_name: str = "default") -> Adapter:
        """A copy of an adapter of a model in memory: training may continue while the copy is served.

        It does not include the adapter's strength in the model: each request has its own.

        Raises:
            ValueError: as for `of`; or it is not a ReFT adapter, or some of its subspaces are switched off.
        """
        config = model.peft_config[adapter_name]
        if not isinstance(config, ReftConfig):
            raise ValueError(f"{adapter_name!r} is a {config.peft_type} adapter, not a ReFT adapter.")
        if any(
            settings.coordinates is not None
            for layer in layers(model)
            if (settings := layer.reft_settings.get(adapter_name)) is not None
        ):
            raise ValueError(
                f"The adapter {adapter_name!r} has subspaces switched off, which cannot be served. Switch all on with "
                f"set_subspaces({adapter_name!r}, None)."
            )
        # Copies: the optimizer writes into the parameters.
        tensors = {name: t.clone() for name, t in get_peft_model_state_dict(model, adapter_name=adapter_name).items()}
        return cls.of(config, tensors, adapter_name)

    @property
    def parsed_positions(self) -> Positions:
        return parse(self.positions, self.share_weights)

    @cached_property
    def fingerprint(self) -> str:
        """A digest of the weights and of the options that give them their meaning: equal for equal edits."""
        digest = hashlib.sha256(json.dumps(self._settings, sort_keys=True).encode())
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    @property
    def _settings(self) -> dict[str, Any]:
        names = ("intervention", "act_fn", "positions", "share_weights")
        return {name: getattr(self, name) for name in names}

    def pack(self) -> tuple[str, bytes]:
        """Serialize the adapter for another process; `unpack` reads it."""
        return json.dumps(self._settings), safetensors.torch.save(dict(self.tensors))

    @classmethod
    def unpack(cls, settings: str, tensors: bytes) -> Adapter:
        return cls(**json.loads(settings), tensors=safetensors.torch.load(tensors))

    def to_url(self) -> str:
        """The adapter as a data URL, to pass to a server in place of a path; `load` reads it."""
        settings, tensors = self.pack()
        return f"{_URL}{quote(settings)};base64,{base64.b64encode(tensors).decode()}"

    @cached_property
    def places(self) -> dict[Place, dict[str, torch.Tensor]]:
        """The parameters by name, for each place that is edited."""
        found: dict[Place, dict[str, torch.Tensor]] = {}
        for name, tensor in self.tensors.items():
            key = _KEY.fullmatch(name)
            place = Place(int(key["layer"]), key["module"] or "", _SIDES[key["child"]])
            found.setdefault(place, {})[key["parameter"]] = tensor
        return found

    @property
    def blocks(self) -> set[str]:
        """Names of the stacks of layers that are edited."""
        return {_KEY.fullmatch(name)["blocks"] for name in self.tensors}

    def intervention_at(self, place: Place) -> Intervention:
        """The intervention of one place, on the CPU.

        Raises:
            ValueError: a parameter is missing or has another shape.
        """
        parameters = self.places[place]
        units, *_, features = next(t.shape for name, t in parameters.items() if name in ("projection", "scale"))
        rank = parameters["projection"].shape[1] if "projection" in parameters else 0
        with torch.device("meta"):
            intervention = INTERVENTIONS[self.intervention](features, rank, units, self.act_fn)
        try:
            intervention.load_state_dict(parameters, assign=True)
        except RuntimeError as error:
            raise ValueError(str(error)) from error
        return intervention.eval().requires_grad_(False)


def check(name: str, adapter: Adapter, hidden_size: int, layers: int) -> None:
    """Refuse an adapter of another model, or with parameters that do not fit together.

    Args:
        name: the adapter's name in messages.
        adapter: the adapter.
        hidden_size, layers: hidden size and number of layers of the model.

    Raises:
        ValueError: it cannot be served with this model.
    """
    origin = f" It was trained on {adapter.base_model!r}." if adapter.base_model else ""
    if len(adapter.blocks) > 1:
        raise ValueError(
            f"The adapter {name!r} edits several streams of tokens ({', '.join(sorted(adapter.blocks))}): vLLM serves "
            "edits of one stack of layers only."
        )
    units = adapter.parsed_positions.units
    for place, parameters in adapter.places.items():
        if place.layer >= layers:
            raise ValueError(
                f"The adapter {name!r} edits layer {place.layer}, but the served model has {layers} layers.{origin}"
            )
        if not {"projection", "scale"} & parameters.keys():
            raise ValueError(f"The adapter {name!r} is broken: parameters are missing at {place}.")
        try:
            intervention = adapter.intervention_at(place)
        except ValueError as error:
            raise ValueError(f"The adapter {name!r} is broken at {place}: {error}") from error
        width = next(iter(intervention.parameters())).shape[-1]
        if width != hidden_size:
            raise ValueError(
                f"The adapter {name!r} edits representations of size {width} at {place}, but the served model has "
                f"hidden size {hidden_size}.{origin}"
            )
        if intervention.units != units:
            raise ValueError(
                f"The adapter {name!r} is broken: positions={adapter.positions!r} with "
                f"share_weights={adapter.share_weights} need {units} units, but there are {intervention.units}."
            )
