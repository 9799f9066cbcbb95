"""The command line of `peft_reft.convert`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from peft_reft.convert import AUTO_CLASSES, convert
from peft_reft.interventions import INTERVENTIONS

_METHODS = tuple(name for name, method in INTERVENTIONS.items() if method.low_rank)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m peft_reft.convert",
        description="Convert a ReFT adapter of pyreft or of AdapterHub's adapters into a PEFT adapter with the same "
        "outputs. Only the configuration of the base model is read.",
    )
    parser.add_argument("source", metavar="SRC", help="folder that pyreft or adapters saved")
    parser.add_argument("target", metavar="DST", help="folder to write; must not exist or be empty")
    parser.add_argument("--positions", help="tokens that pyreft edited, such as f7+l7 (adapters stores it)")
    parser.add_argument(
        "--share-weights", action="store_true", help="pyreft edited all positions with the same weights"
    )
    parser.add_argument("--base-model", help="name or folder of the base model")
    parser.add_argument("--intervention", choices=sorted(_METHODS), help="the method, if the folder does not store it")
    parser.add_argument("--act-fn", help="activation that pyreft used (adapters stores it)")
    parser.add_argument("--dropout", type=float, help="dropout that pyreft used (adapters stores it)")
    parser.add_argument("--task-type", default="CAUSAL_LM", choices=sorted(AUTO_CLASSES), help="default: CAUSAL_LM")
    parser.add_argument("--num-labels", type=int, help="labels of a classifier, if the base's configuration has others")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = vars(parser.parse_args(arguments))
    try:
        target = convert(options.pop("source"), options.pop("target"), **options)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{error}\n")
    print(f"Saved {target}")


if __name__ == "__main__":
    main()
