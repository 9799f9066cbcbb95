"""What a config refuses, how it is stored, and the registration on import."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import subprocess
import sys

import pytest
from peft import PeftConfig

from peft_reft import ReftConfig

OWN_FIELDS = [field for field in dataclasses.fields(ReftConfig) if field.name in ReftConfig.__annotations__]
# A value other than the default for every field; `target_modules` excludes some of the others.
SETTINGS = {
    "r": 3,
    "positions": "f2+c5",
    "share_weights": False,
    "intervention": "loreft",
    "layers_to_transform": [0, -1],
    "layers_pattern": ["encoder.layers", "decoder.layers"],
    "component": "block_output",
    "target_modules": ["mlp", "o_proj"],
    "exclude_modules": r".*\.0\..*",
    "modules_to_save": ["score"],
    "trainable_token_indices": {"embed_tokens": [5, 7]},
    "ensure_weight_tying": True,
    "dropout": 0.25,
    "act_fn": "gelu",
    "use_bias": False,
    "subspaces": {"style": 1, "task": 2},
    "freeze_subspace": True,
    "init_weights": "pyreft",
}


def run(code: str) -> str:
    """Standard output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"r": 0}, "r must be a positive integer, got 0"),
        ({"r": -4}, "r must be a positive integer, got -4"),
        ({"r": True}, "r must be a positive integer, got True"),
        ({"r": 2.0}, "r must be a positive integer, got 2.0"),
        ({"r": "8"}, "r must be a positive integer, got '8'"),
        ({"dropout": -0.1}, "dropout must be in [0, 1), got -0.1"),
        ({"dropout": 1.0}, "dropout must be in [0, 1), got 1.0"),
        ({"dropout": float("nan")}, "dropout must be in [0, 1), got nan"),
        ({"dropout": "half"}, "dropout must be in [0, 1), got 'half'"),
        ({"share_weights": "no"}, "share_weights must be True or False, got 'no'"),
        ({"init_weights": "zero"}, "init_weights must be True, False or 'pyreft', got 'zero'"),
        ({"init_weights": 1}, "init_weights must be True, False or 'pyreft', got 1"),
        ({"intervention": "lora"}, "Unknown intervention 'lora'; allowed are ['"),
        ({"component": "mlp"}, "Unknown component 'mlp'; allowed are ['block_output'"),
        ({"act_fn": "cube"}, "Unknown act_fn 'cube'; allowed are ['"),
        ({"act_fn": ["gelu"]}, "Unknown act_fn ['gelu']; allowed are ['"),
        ({"layers_to_transform": []}, "layers_to_transform=[] selects no layer; None selects every layer"),
        ({"layers_to_transform": "0"}, "layers_to_transform must be an integer or integers, got '0'"),
        ({"layers_to_transform": [0, 1.5]}, "layers_to_transform must be an integer or integers, got [0, 1.5]"),
        ({"layers_to_transform": True}, "layers_to_transform must be an integer or integers, got True"),
        ({"target_modules": []}, "target_modules=[] selects nothing"),
        ({"target_modules": ""}, "target_modules='' selects nothing"),
        ({"target_modules": 5}, "target_modules must be a string or a list of strings, got 5"),
        ({"target_modules": "mlp("}, "target_modules='mlp(' is not a regular expression: missing )"),
        ({"exclude_modules": [0]}, "exclude_modules must be a string or a list of strings, got [0]"),
        ({"exclude_modules": "*"}, "exclude_modules='*' is not a regular expression: nothing to repeat"),
        ({"layers_pattern": 1}, "layers_pattern must be a string or a list of strings, got 1"),
        ({"modules_to_save": "score"}, "modules_to_save must be a list of strings, got 'score'"),
        ({"trainable_token_indices": 5}, "trainable_token_indices must be a list of integers, or"),
        ({"trainable_token_indices": ["<new>"]}, "a dictionary of such lists, got ['<new>']"),
        ({"trainable_token_indices": {"wte": 5}}, "a dictionary of such lists, got {'wte': 5}"),
        (
            {"target_modules": ".*mlp", "layers_to_transform": [0]},
            "layers_to_transform=[0] cannot be combined with the regular expression target_modules='.*mlp'",
        ),
    ],
    ids=lambda value: ",".join(f"{k}={v!r}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_refused_by_name_and_value(settings, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        ReftConfig(**settings)


@pytest.mark.parametrize(
    ("spec", "column"),
    [
        ("", 0),
        ("x7", 0),
        ("F7", 0),
        ("f", 0),
        ("f0", 0),
        ("f-1", 0),
        ("f1.5", 0),
        ("f7,l7", 0),
        ("f7+", 3),
        ("f7+x7", 3),
        ("f7+l", 3),
        ("f7 + prompts", 5),
        ("  all+ c2x", 7),
    ],
)
def test_an_unknown_word_in_positions_is_pointed_at(spec, column):
    with pytest.raises(ValueError, match=f"in positions, at character {column}:") as caught:
        ReftConfig(positions=spec)
    _, shown, pointer, allowed = str(caught.value).split("\n")
    assert shown == f"  {spec}"
    assert pointer.index("^") == 2 + column
    assert all(word in allowed for word in ("f<n>", "l<n>", "c<n>", "prompt", "completion", "all"))


@pytest.mark.parametrize("spec", ["f3+f2", "l1+l1", "f2+prompt", "prompt+l2", "all+prompt", "completion+c3", "c1+all"])
def test_two_words_that_can_select_one_token_are_refused(spec):
    first, second = spec.split("+")
    with pytest.raises(ValueError, match=f"'{first}' and '{second}' can select the same token; keep one of them"):
        ReftConfig(positions=spec)


@pytest.mark.parametrize("spec", [None, 7, ["f7", "l7"]])
def test_positions_of_another_type_are_refused(spec):
    with pytest.raises(TypeError, match=r"positions must be a string such as 'f7\+l7', got " + re.escape(repr(spec))):
        ReftConfig(positions=spec)


# Storage


def test_the_settings_of_this_test_cover_every_field():
    assert list(SETTINGS) == [field.name for field in OWN_FIELDS]


# Subspaces share out the rank.
ALONE = [{name: value} | ({"r": 3} if name == "subspaces" else {}) for name, value in SETTINGS.items()]


@pytest.mark.parametrize("settings", [{}, *ALONE, SETTINGS])
def test_a_config_survives_json_pickle_and_copy(settings, tmp_path):
    config = ReftConfig(**settings, task_type="CAUSAL_LM")
    config.save_pretrained(tmp_path)
    loaded = PeftConfig.from_pretrained(str(tmp_path))
    assert type(loaded) is ReftConfig
    # PEFT saves configs for inference.
    loaded.inference_mode = config.inference_mode
    for twin in (loaded, pickle.loads(pickle.dumps(config)), copy.deepcopy(config), ReftConfig(**config.to_dict())):
        assert twin == config
        assert all(getattr(twin, name) == value for name, value in settings.items())


@pytest.mark.parametrize(
    ("settings", "stored"),
    [
        ({"target_modules": {"q", "k"}}, ["k", "q"]),
        ({"target_modules": ("q", "k")}, ["q", "k"]),
        ({"exclude_modules": {"q", "k"}}, ["k", "q"]),
        ({"modules_to_save": ("score",)}, ["score"]),
        ({"trainable_token_indices": (5, 7)}, [5, 7]),
        ({"layers_to_transform": {2, 0}}, [0, 2]),
        ({"layers_to_transform": range(3)}, [0, 1, 2]),
        ({"layers_to_transform": -1}, -1),
    ],
)
def test_any_collection_is_stored_as_a_list(settings, stored, tmp_path):
    ReftConfig(**settings).save_pretrained(tmp_path)
    (name,) = settings
    assert json.loads((tmp_path / "adapter_config.json").read_text())[name] == stored


def test_every_field_is_explained_in_the_docstring_and_in_its_metadata():
    # Python 3.13 leaves out the indentation of docstrings.
    explained = inspect.getdoc(ReftConfig)
    for field in OWN_FIELDS:
        assert field.metadata["help"].endswith((".", "'.")), field.name
        assert re.search(rf"^ {{4}}{field.name} \(`.+`\):$", explained, re.MULTILINE), field.name


# Registration, in a fresh interpreter


@pytest.fixture(scope="module")
def fresh() -> dict[str, object]:
    """What an interpreter finds that first imports the package while unpickling, and then imports all of it again."""
    pickled = pickle.dumps((ReftConfig(r=3), ReftConfig().peft_type))
    code = f"""
import json, pickle, sys, torch, peft, transformers
before = {{name.partition(".")[0] for name in sys.modules}}
config, peft_type = pickle.loads({pickled!r})
loaded = {{name.partition(".")[0] for name in sys.modules}} - before - set(sys.stdlib_module_names)

for name in [name for name in sys.modules if name.startswith("peft_reft")]:
    del sys.modules[name]
import peft_reft
from peft import PeftType, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

again = peft_reft.ReftConfig(r=2, target_modules=["0"])
model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(4, 4)), again)
print(json.dumps({{
    "loaded": sorted(loaded),
    "config": [type(config).__name__, config.r, type(config) is type(again)],
    "same member": config.peft_type is peft_type is again.peft_type is PeftType("REFT") is PeftType.REFT,
    "members": [str(member.value) for member in PeftType].count("REFT"),
    "prefix": PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.REFT],
    "config class": PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.REFT] is peft_reft.ReftConfig,
    "tuner class": PEFT_TYPE_TO_TUNER_MAPPING[PeftType.REFT] is type(model.base_model) is peft_reft.ReftModel,
}}))
"""
    return json.loads(run(code))


def test_the_import_loads_nothing_heavier_than_torch_peft_and_transformers(fresh):
    assert fresh["loaded"] == ["peft_reft"]


def test_a_config_unpickles_where_the_package_was_not_imported(fresh):
    assert fresh["config"] == ["ReftConfig", 3, False]


def test_a_second_import_of_everything_keeps_the_member_and_registers_its_own_classes(fresh):
    assert fresh["same member"]
    assert (fresh["members"], fresh["prefix"]) == (1, "reft_")
    assert fresh["config class"]
    assert fresh["tuner class"]


def test_a_peft_that_has_a_reft_of_its_own_is_a_clear_error():
    code = """
import sys
from importlib.machinery import SourceFileLoader
sys.dont_write_bytecode = True
get_data = SourceFileLoader.get_data

def with_reft(self, path):
    if "peft_types" not in path:
        return get_data(self, path)
    if path.endswith(".pyc"):
        raise OSError("read the source")
    return get_data(self, path).replace(b'    LORA = "LORA"\\n', b'    LORA = "LORA"\\n    REFT = "REFT"\\n')

SourceFileLoader.get_data = with_reft
import peft
assert peft.PeftType.REFT.value == "REFT"
try:
    import peft_reft
except ImportError as error:
    print(error)
"""
    assert "PeftType.REFT already exists and belongs to an unknown package" in run(code)
