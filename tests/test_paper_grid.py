"""The grid of methods, rates and seeds, and the report on its results."""

from __future__ import annotations

import argparse
import json
import math
import sys
from itertools import pairwise
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "examples" / "paper"))

import grid
import plan
import report


def result(label, rate, seed, quality, score, task="sst2", parameters=770 + 100):
    return {
        "picking_scores": {"score": quality},
        "name": f"cpu/{task}/{label}-{rate}-{seed}",
        "task": task,
        "label": label,
        "learning_rate": rate,
        "seed": seed,
        "flags": [],
        "quality": quality,
        "scores": {} if score is None else {"score": score, "standard_error": 2.0},
        "trainable_parameters": parameters,
        "head_parameters": 770,
        "base_parameters": 10_000,
        "adapter_bytes": 2048,
        "seconds": {"train": 3.0, "evaluate": 1.0},
        "processor_seconds": {"train": 2.0, "evaluate": 1.0},
        "peak_memory_mib": {"train": 100.0, "evaluate": 50.0},
        "machine": "Some processor, 1 thread of 2 CPUs",
        "versions": "torch 1",
        "losses": [[1, 1.0], [2, 0.5]],
    }


def test_report_picks_the_rate_by_rows_that_do_not_score(tmp_path):
    results = [
        result("LoReFT r=4 all", 1e-3, 42, 60, 90),
        result("LoReFT r=4 all", 3e-3, 42, 70, 65),
        result("LoReFT r=4 all", 1e-2, 42, 61, 95),
        result("LoReFT r=4 all", 3e-2, 42, 61, 94),
        result("LoReFT r=4 all", 3e-3, 43, 75, 71),
        result("LoReFT r=4 all", 3e-3, 44, 75, 68),
        result("head alone", 1e-3, 42, 50, 40, parameters=770),
        result("head alone", 3e-3, 42, 55, 51, parameters=770),
    ]
    text = report.render(results, tmp_path)
    # Two points of the rows and three of the seeds, over the root of three.
    assert "| LoReFT r=4 all | 100 | 1.000% | 0.003 | **68.0 ± 2.6** | 65.0 to 71.0 | 3 | 2 | 100 |" in text
    assert "| LoReFT r=4 all | 60.0 | **70.0** | 61.0 | 61.0 |" in text
    assert "Seconds are those of training, of the processor." in text
    # The best rate is the largest one tried.
    assert "| head alone † | 0 | 0.000% | 0.003 * | **51.0 ± 2.0** | - | 1 | 2 | 100 |" in text
    assert (tmp_path / "scores.png").stat().st_size > 5000
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_report_sets_the_best_small_loreft_beside_lora(tmp_path):
    results = [
        result("LoRA r=8, q and v", 1e-3, 42, 80, 80, parameters=770 + 1000),
        result("LoReFT r=1 all", 1e-3, 42, 78, 78.5),
        result("LoReFT r=1 f3+l3", 1e-3, 42, 77, 90),
        result("LoReFT r=2 all", 1e-3, 42, 90, 95, parameters=770 + 101),
    ]
    line = "| SST-2, MiniLM | LoReFT r=1 all † | 100, 1/10 | 78.5 ± 2.0 | 80.0 ± 2.0 † | - | yes |"
    assert line in report.render(results, tmp_path)
    results[0]["scores"]["score"] = 81
    assert line.replace("80.0", "81.0").replace("yes", "no") in report.render(results, tmp_path)


def test_report_takes_the_score_of_a_run_that_was_scored_afterwards(tmp_path):
    results = [
        result("LoReFT r=1 all", 1e-3, 42, -0.7, None, task="prompted-sst2"),
        result("LoReFT r=1 all", 3e-3, 42, -0.3, None, task="prompted-sst2"),
        result("LoRA r=8, q and v", 1e-3, 42, -0.3, None, task="prompted-sst2"),
        result("LoReFT r=1 all", 3e-3, 42, -0.3, 80, task="prompted-sst2"),
    ]
    for line in results:
        del line["picking_scores"]
    text = report.render(results, tmp_path)
    assert "| LoReFT r=1 all | 0.700 | **0.300** |" in text
    assert "**80.0 ± 2.0**" in text
    # Nothing to say of what has no score yet.
    assert "LoRA" not in text.partition("## All methods")[2].partition("###")[2]


def test_report_keeps_the_text_around_it(tmp_path, monkeypatch):
    (tmp_path / "r.jsonl").write_text(json.dumps(result("LoReFT r=4 all", 1e-3, 42, 60, 90)) + "\n")
    document = tmp_path / "OUT.md"
    document.write_text(f"# Title\n\nBefore.\n\n{report.BEGIN}\nold\n{report.END}\n\nAfter.\n")
    monkeypatch.setattr(sys, "argv", ["report.py", "--results", str(tmp_path / "r.jsonl"), "--document", str(document)])
    report.main()
    text = document.read_text()
    assert text.startswith("# Title\n\nBefore.\n\n")
    assert text.endswith("\n\nAfter.\n")
    assert "old" not in text
    report.main()
    assert document.read_text() == text


def test_every_method_of_the_grid_is_swept_over_four_rates_of_its_ladder():
    for kind, rates in plan.STARTS.items():
        ladder = plan.LADDERS[kind]
        start = ladder.index(rates[0])
        assert rates == ladder[start : start + 4]
        assert 0 < start < len(ladder) - 4
        steps = [after / before for before, after in pairwise(ladder)]
        assert steps == pytest.approx([10**0.5] * len(steps), rel=0.1)


def test_the_plan_has_lora_r8_and_a_tenth_of_it_first():
    for task, plans in plan.TASKS.items():
        labels = [contender.label for contender in plans.contenders]
        assert len(set(labels)) == len(labels)
        assert report.REFERENCE in labels
        core = [contender.label for contender in plans.contenders if contender.stage == 0]
        assert task == "commonsense" or "LoReFT r=1 all" in core
    order = list(plan.studies(["sst2", "choices"], ["LoReFT"]))
    stages = [contender.stage for _, contender in order]
    assert stages == sorted(stages)
    assert order[0][0] == "sst2"
    assert {task for task, _ in order} == {"sst2", "choices"}


@pytest.fixture
def grid_options(tmp_path):
    names = {"data": tmp_path, "output": tmp_path / "grid", "size": "cpu", "seeds": [42, 43, 44], "workers": 2}
    return argparse.Namespace(**names, tasks=["sst2"], methods=["LoReFT r=1 all", "head"])


def written(rate, best):
    """The results of a run: the nearer its rate to the best one, the better."""
    line = result("", rate, 42, 0, 80)
    return line | {"picking_scores": {"score": -abs(math.log(rate / best))}, "log": [{"loss": 1.0, "step": 1}]}


def run_at(best, fails=()):
    def run(job, options):
        if job.rate in fails:
            sys.exit(1)
        file = job.results_file(options.output)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(written(job.rate, best)))

    return run


def test_grid_widens_the_sweep_and_then_runs_the_seeds(grid_options, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "run_job", run_at(6e-5))
    file = tmp_path / "results.jsonl"
    grid.run_all(results := grid.Results(file), grid_options)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    reft = [(line["learning_rate"], line["seed"]) for line in lines if line["label"] == "LoReFT r=1 all"]
    first, widened, seeds = reft[:4], reft[4:7], reft[7:]
    assert sorted(first) == [(rate, 42) for rate in plan.STARTS["reft"]]
    assert widened == [(2e-4, 42), (6e-5, 42), (2e-5, 42)]
    assert sorted(seeds) == [(6e-5, 43), (6e-5, 44)]
    # The ladder has no more rates than these.
    head = [line["learning_rate"] for line in lines if line["label"] == "head alone" and line["seed"] == 42]
    assert min(head) == min(plan.LADDERS["head"])
    assert lines[0]["losses"] == [[1, 1.0]]

    # All is there: nothing is run again, from the file alone.
    monkeypatch.setattr(grid, "run_job", None)
    grid.run_all(grid.Results(file), grid_options)
    assert len(file.read_text().splitlines()) == len(lines) == len(results.lines)


def test_grid_scores_the_best_run_of_a_sweep_that_is_not_scored(grid_options, tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "run_job", run_at(6e-3))
    grid_options.tasks, grid_options.methods = ["prompted-sst2"], ["LoReFT r=1 all"]
    grid.run_all(results := grid.Results(tmp_path / "results.jsonl"), grid_options)
    scored = {name for name in results.lines if not name.endswith("-unscored")}
    assert scored == {f"cpu/prompted-sst2/loreft-r=1-all-0.006-seed{seed}" for seed in (42, 43, 44)}
    assert len(results.lines) == 4 + 3
    unscored = results.lines["cpu/prompted-sst2/loreft-r=1-all-0.002-seed42-unscored"]
    assert unscored["flags"][-2:] == ["--eval_rows", "0"]
    # The scored run finds what was trained in the folder.
    jobs = list(grid.all_wanted(results, grid_options))
    assert len({job.folder for job in jobs}) == 4 + 2


def test_grid_runs_the_rest_when_a_run_fails(grid_options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(grid, "run_job", run_at(6e-3, fails=[2e-3]))
    file = tmp_path / "results.jsonl"
    grid.run_all(grid.Results(file), grid_options)
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert {line["learning_rate"] for line in lines if line["label"] == "LoReFT r=1 all"} == {6e-4, 6e-3, 2e-2}
    assert len([line for line in lines if line["label"] == "head alone"]) > 4
    assert "loreft-r=1-all-0.002-seed42  failed, see " in capsys.readouterr().out


def test_grid_refuses_results_of_other_flags(tmp_path):
    (_, contender), *_ = plan.studies(["sst2"], ["head"])
    job = grid.Job("sst2", contender, 1e-3, 42, "cpu")
    file = tmp_path / "results.jsonl"
    assert grid.Results(file).get(job) is None
    line = {"name": job.name, "flags": job.flags}
    file.write_text(json.dumps(line) + "\n")
    assert grid.Results(file).get(job) == line
    file.write_text(json.dumps(line | {"flags": ["--train_rows", "7"]}) + "\n")
    with pytest.raises(SystemExit, match=r"was run with \['--train_rows', '7'\], not .*'4000'.* another --results"):
        grid.Results(file).get(job)
