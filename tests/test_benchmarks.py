"""The benchmarks in `examples/benchmarks`: what they compute from times, and that the floor is the frozen model."""

import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from peft import get_peft_model

from peft_reft import ReftConfig
from peft_reft.tokens.positions import parse

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import finding_positions  # noqa: E402
import harness  # noqa: E402
import loading  # noqa: E402
import models  # noqa: E402
import run_all  # noqa: E402
from harness import Spread  # noqa: E402
from models import LORA, LORA_ALL, LOREFT, LOREFT_ALL, LOREFT_UPPER  # noqa: E402


def test_spread_is_median_and_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0, 7.0]
    middle, low, high = Spread.of(values)
    assert middle == statistics.median(values)
    # By hand: of sorted [1, 2, 3, 4, 5, 7, 9] the quartiles lie halfway between 2 and 3, and 5 and 7.
    assert (low, high) == (2.5, 6.0)
    assert Spread.of([3.0]) == (3, 3, 3)
    assert f"{Spread(1.0, 0.5, 2.0):.1f}" == "1.0 (0.5-2.0)"


def test_ratio_compares_within_rounds():
    # A machine that gets ten times slower: the ratio of every round is 2, that of medians is not.
    times = {"a": {"step": [2.0, 20.0, 200.0]}, "b": {"step": [1.0, 10.0, 100.0]}}
    assert harness.ratio(times, "a", "b", "step") == (2, 2, 2)


def test_interleave_rotates_the_order_and_drops_the_warmup():
    calls = []

    def run(name):
        calls.append(name)
        return {"step": float(len(calls))}

    runs = {name: (lambda name=name: run(name)) for name in "abc"}
    times = harness.interleave(runs, rounds=3)
    assert "".join(calls) == "abcbcacababc"
    assert {name: one["step"] for name, one in times.items()} == {"a": [6, 8, 10], "b": [4, 9, 11], "c": [5, 7, 12]}


def test_short_runs_are_repeated_and_averaged():
    now = iter(range(100))
    ran = []
    # The clock goes on by one at each look: at the beginning, before each further run, and at the end.
    timed = harness.time_often(lambda: ran.append(1), lambda: float(next(now)), least=4)
    assert timed() == {"time": (5 - 0) / 4}
    assert len(ran) == 4


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_floor_ends_its_backward_pass_where_that_of_the_lowest_edit_may(layer):
    base = tiny.llama()
    ids = torch.randint(tiny.VOCAB, (2, 6))
    floor = models.floor(base, layer)
    edited = get_peft_model(models.twin(base), ReftConfig(r=2, positions="all", layers_to_transform=[layer]))
    everything = tiny.llama()

    def gradients(model, blocks):
        outputs = []
        for block in blocks:
            block.register_forward_hook(lambda module, args, output: outputs.append(output))
        loss = model(input_ids=ids, labels=ids).loss
        for output in outputs:
            if output.requires_grad:
                output.retain_grad()
        loss.backward()
        return [output.grad for output in outputs]

    own = gradients(floor, floor.model.layers)
    of_edited = gradients(edited, edited.base_model.model.model.layers)
    expected = gradients(everything, everything.model.layers)
    assert [grad is not None for grad in own] == [index >= layer for index in range(tiny.LAYERS)]
    assert [grad is not None for grad in own] == [grad is not None for grad in of_edited]
    for index in range(layer, tiny.LAYERS):
        torch.testing.assert_close(own[index], expected[index])
    assert all(parameter.grad is None for parameter in floor.parameters())


def test_twins_share_parameters_and_leave_the_base_alone():
    base = tiny.llama()
    ids = torch.randint(tiny.VOCAB, (2, 6))
    before = base(ids).logits
    adapted = models.adapted(base, LOREFT_ALL, random=True)
    shared = {parameter.data_ptr() for parameter in base.parameters()}
    own = [p for name, p in adapted.named_parameters() if "reft_" not in name]
    assert {parameter.data_ptr() for parameter in own} == shared
    assert not torch.allclose(adapted(ids).logits, before)
    assert torch.equal(base(ids).logits, before)


@pytest.mark.parametrize("variant", [LOREFT, LOREFT_ALL, LOREFT_UPPER, LORA, LORA_ALL])
def test_variants_are_what_they_are_called(variant):
    config = models.adapter(variant, layers=6)
    expected = {
        LOREFT: {"r": 4, "positions": "f7+l7", "layers_to_transform": None},
        LOREFT_ALL: {"r": 4, "positions": "all", "layers_to_transform": None},
        LOREFT_UPPER: {"r": 4, "positions": "f7+l7", "layers_to_transform": [3, 4, 5]},
        LORA: {"r": 8, "target_modules": {"q_proj", "v_proj"}},
        LORA_ALL: {"r": 16, "target_modules": "all-linear"},
    }[variant]
    assert {name: getattr(config, name) for name in expected} == expected


def _results(reft_step=1.0):
    """What the scripts write, with times of which the ratios are known."""
    step = {
        "frozen model": 1.0,
        "LoReFT f7+l7": reft_step,
        "LoReFT f7+l7, upper half": 0.9,
        "LoRA r=8, q and v": 1.25,
    }
    total = {"bare model": 1.0, "LoReFT f7+l7": 1.01, "LoReFT all": 1.2, "LoRA r=16, all linear": 1.5}
    phases = {"bare model": (1.0, 1.0), "LoReFT f7+l7": (1.1, 1.04)}
    memory = {
        "LoReFT f7+l7": {"memory": [90.0], "file_bytes": 103, "parameter_bytes": 100},
        "LoReFT all": {"memory": [100.0], "file_bytes": 103, "parameter_bytes": 100},
        "LoRA r=8, q and v": {"memory": [100.0], "file_bytes": 101, "parameter_bytes": 100},
    }
    attach = {"LoReFT f7+l7, without weights": [60.0, 60.0], "LoReFT f7+l7, with weights": [120.0, 120.0]}
    positions = {"training, right-padded": 0.05, "generate, left-padded": 0.2, "prompts known": 0.01}
    positions = {f"{case}, f7+l7": [time, time] for case, time in positions.items()}
    return {
        "training_step 34m": {"times": {name: {"step": [t, 10 * t]} for name, t in step.items()}, "text": "a"},
        "generation": {"times": {"4": {name: {"total": [t, 10 * t]} for name, t in total.items()}}, "text": "b"},
        "many_adapters": {
            "times": {"64": {n: {"prefill": [a, a], "decode step": [b, b]} for n, (a, b) in phases.items()}},
            "text": "c",
        },
        "memory": {"memory": {"34m": memory}, "text": "d"},
        "loading": {"attach": attach, "load": {"LoReFT f7+l7": [10.0] * 95 + [25.0] * 5}, "text": "e"},
        "finding_positions": {"times": positions, "text": "f"},
        "intervention": {"times": {"d=4096, r=8": {"peft_reft": {"time": [4.0, 4.0]}}}, "text": "g"},
    }


def _verdicts(results):
    return [(t.measured and round(t.measured.median, 6), t.met) for t in run_all.targets(results, ["34m"])]


def test_table_of_targets():
    assert _verdicts(_results()) == [
        (1.0, True),  # training step beside the floor, <= 1.03
        (0.8, True),  # beside LoRA, < 1
        (0.72, True),  # upper half beside LoRA, <= 0.8
        (0.9, True),  # memory
        (1.0, True),
        (1.03, False),  # file, <= 1.02
        (1.01, True),  # generate, <= 1.02
        (1.2, False),  # all, <= 1.1
        (0.8, True),  # all beside LoRA all-linear
        (1.1, True),  # 64 adapters, prefill <= 1.15
        (1.04, False),  # decode <= 1.02
        (None, None),  # no pyreft
        (0.05, True),  # positions, <= 0.1 ms
        (0.2, False),
        (0.01, True),  # with the prompts known
        (60.0, True),  # attach, <= 100 ms
        (120.0, False),
        (2.5, False),  # the hundredth adapter
    ]


def test_targets_at_their_limits():
    # At the limit a "<=" is met and a "<" is not; nothing is rounded.
    met = [verdict for _, verdict in _verdicts(_results(reft_step=1.03))]
    assert met[:2] == [True, True]
    assert not _verdicts(_results(reft_step=1.0301))[0][1]
    assert not _verdicts(_results(reft_step=1.25))[1][1]


def test_pyreft_is_a_target_when_it_was_measured():
    results = _results()
    results["intervention"]["times"]["d=4096, r=8"]["pyreft"] = {"time": [399.0, 399.0, 800.0]}
    assert (99.75, False) in _verdicts(results)
    results["intervention"]["times"]["d=4096, r=8"]["pyreft"] = {"time": [400.0, 400.0, 800.0]}
    assert (100.0, True) in _verdicts(results)


def test_report_says_which_targets_are_missed():
    lines = run_all.report(_results(), ["34m"]).splitlines()
    row = next(line for line in lines if line.startswith("| generate, batch 4, LoReFT all / bare model"))
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == ["<= 1.1", "1.200", "**no**"]
    row = next(line for line in lines if "pyreft /" in line)
    assert [cell.strip() for cell in row.strip("|").split("|")][1:] == [">= 100", "", "not measured"]
    # Every benchmark's own report follows.
    assert [line for line in lines if len(line) == 1] == list("abcdefg")


def test_growth_of_loading_times():
    assert loading.growth([1.0, 2.0, 2.0, 2.0, 9.0, 50.0, 3.0, 4.0, 5.0, 6.0, 8.0]) == (2.5, 2.0, 3.0)


@pytest.mark.slow
def test_quick_run_of_everything(tmp_path):
    report = tmp_path / "report.md"
    command = [sys.executable, BENCHMARKS / "run_all.py", "--quick", "--output", report]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = report.read_text()
    rows = [line for line in text.splitlines() if line.endswith(("| yes |", "| **no** |", "| not measured |"))]
    # Six of each of two models, and eleven of one.
    assert len(rows) == 24
    assert [row for row in rows if row.endswith("not measured |")] == [row for row in rows if "pyreft /" in row]
    assert done.stdout.strip() == text.strip()


@pytest.mark.parametrize("case", [finding_positions.TRAINING, finding_positions.PACKED, finding_positions.GENERATION])
@pytest.mark.parametrize("spec", finding_positions.SPECS)
def test_finding_positions_times_passes_that_have_something_to_edit(case, spec):
    hidden = torch.zeros(2, 64, 1)
    stream = finding_positions.streams(2, 64, torch.device("cpu"))[case]
    found = finding_positions.find(stream, parse(spec), hidden)
    again = finding_positions.find_more(stream(), parse(spec), hidden)
    assert (again is None) == (found is None)
    # A prompt is all that `generate` hands over.
    assert (found is None) == (case == finding_positions.GENERATION and spec == "completion")
