"""The command `peft-reft`: run a program with ReFT registered, convert an adapter, show one."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

_USAGE = """usage: peft-reft COMMAND ...

  run PROGRAM [ARGUMENTS...]    run a program that loads adapters itself, with ReFT registered: lm_eval, trl, a script
  convert SRC DST [OPTIONS...]  convert an adapter of pyreft or of AdapterHub's adapters into a PEFT adapter
  show ADAPTER [TEXT]           print a summary of a saved adapter, and the tokens of a text that it edits

See peft-reft COMMAND --help.
"""


def main(arguments: Sequence[str] | None = None) -> Any:
    """The command line."""
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments), ""]
    rest = rest[:-1]
    if command == "run":
        from peft_reft import run

        return run.main(rest)
    if command == "convert":
        from peft_reft.convert.__main__ import main as convert

        return convert(rest)
    if command == "show":
        from peft_reft import show

        return show.main(rest)
    print(_USAGE, end="", file=sys.stdout if command in ("-h", "--help") else sys.stderr)
    return 0 if command in ("-h", "--help") else 2


if __name__ == "__main__":
    sys.exit(main())
