"""Makes REFT a PEFT method: a member of `PeftType` and an entry in each of PEFT's registries."""

from __future__ import annotations

from peft import PeftConfig, helpers
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method

NAME = "REFT"
ORIGIN = "peft_reft"


def ensure_peft_type() -> PeftType:
    """Return `PeftType.REFT`, adding it to PEFT's enum the first time.

    Raises:
        ImportError: another package, or PEFT itself, already defines a REFT member.
    """
    member = PeftType.__members__.get(NAME)
    if member is None:
        return _add_peft_type()
    if getattr(member, "origin", None) != ORIGIN:
        owner = PEFT_TYPE_TO_TUNER_MAPPING.get(member)
        where = f"{owner.__module__}.{owner.__qualname__}" if owner is not None else "an unknown package"
        raise ImportError(
            f"PeftType.{NAME} already exists and belongs to {where}, so peft_reft cannot register its own. "
            "Uninstall or do not import one of the two, or use a PEFT version without its own ReFT."
        )
    return member


def _add_peft_type() -> PeftType:
    # PEFT has no extension point for this: `register_peft_method` refuses names outside the enum.
    member = str.__new__(PeftType, NAME)
    member._name_ = NAME
    member._value_ = NAME
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    member.origin = ORIGIN
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member
    # EnumType guards attribute assignment of members, its parent class does not.
    type.__setattr__(PeftType, NAME, member)
    return member


def register(config_cls: type[PeftConfig], tuner_cls: type[BaseTuner], layer_cls: type[BaseTunerLayer]) -> None:
    """Register the method's classes with PEFT. Safe to call again: the last classes win."""
    peft_type = ensure_peft_type()
    for registry in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING):
        registry.pop(peft_type, None)
    register_peft_method(name=NAME.lower(), config_cls=config_cls, model_cls=tuner_cls, prefix=tuner_cls.prefix)
    # `rescale_adapter_scale` looks for LoRA's layers by class; `layer_cls` has all the methods that it calls.
    helpers.LoraLayer = (LoraLayer, layer_cls)
