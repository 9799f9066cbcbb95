"""Representation finetuning (ReFT, Wu et al. 2024, arXiv 2404.03592) as a method of Hugging Face PEFT.

Importing this package registers `PeftType.REFT`; from then on `get_peft_model(model, ReftConfig(...))` and everything
built on it accepts a `ReftConfig` where it accepts a `LoraConfig`.
"""

import peft_reft.quiet  # noqa: F401  # isort: skip  before everything that imports PEFT
from peft_reft.adapter_files import check_adapters_before_loading
from peft_reft.analysis.directions import directions_from_pairs
from peft_reft.analysis.norms import EditNorms, edit_norms
from peft_reft.analysis.show import show_positions
from peft_reft.analysis.summary import summary
from peft_reft.attach import prompt_mask_of
from peft_reft.config import ReftConfig
from peft_reft.convert import convert
from peft_reft.interventions import Intervention, LowRankIntervention, register_intervention
from peft_reft.layer import ReftLayer
from peft_reft.model import ReftModel
from peft_reft.registration import register

register(ReftConfig, ReftModel, ReftLayer)
check_adapters_before_loading()

__version__ = "0.1.0"
__all__ = [
    "EditNorms",
    "Intervention",
    "LowRankIntervention",
    "ReftConfig",
    "ReftLayer",
    "ReftModel",
    "convert",
    "directions_from_pairs",
    "edit_norms",
    "prompt_mask_of",
    "register_intervention",
    "show_positions",
    "summary",
]
