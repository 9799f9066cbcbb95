"""Shared by the suites' scripts: arguments, data, starting, resuming and recording a run.

Import it before torch, Transformers and Datasets (hence `isort: split`): it sets what they read from the environment.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import resource
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

if "--quick" in sys.argv:
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Threads that spin while they wait make a CPU that is shared with other programs several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

import datasets
import torch
from machine import machine, versions
from methods import LEARNING_RATES, LORA_RANK, METHODS, REFT, peft_config
from peft import PeftConfig, PeftModel
from presets import Recipe, recipe
from suites import Row
from transformers import (
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
)
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import is_torch_bf16_gpu_available
from transformers.utils.logging import disable_progress_bar

MIB = 2**20
SAMPLES = Path(__file__).resolve().parent / "data"


@dataclass
class PaperArguments:
    """The options of a run besides the trainer's arguments. None stands for the preset's value."""

    preset: str | None = field(
        default=None,
        metadata={
            "help": "Hyper-parameters and model: llama-7b or llama-13b (GLUE: roberta-base, roberta-large) as in "
            "the paper, or smollm2 (GLUE: minilm), the default."
        },
    )
    model: str | None = field(default=None, metadata={"help": "Hub id or path of the base model."})
    method: str = field(default="loreft", metadata={"help": "What is trained.", "choices": METHODS})
    data: str | None = field(
        default=None, metadata={"help": "Folder of the suite's data, or the name of a data set on the hub."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Which tasks, all that there are by default."})
    rank: int | None = field(default=None, metadata={"help": "Rank of ReFT's subspaces, or of LoRA's (8)."})
    positions: str | None = field(default=None, metadata={"help": "Which tokens ReFT edits."})
    layers: list[int] | None = field(default=None, metadata={"help": "Which layers ReFT edits."})
    share_weights: bool = field(default=True, metadata={"help": "Whether one edit serves all words of the positions."})
    dropout: float | None = field(default=None, metadata={"help": "The adapter's dropout."})
    init_weights: str = field(
        default="identity", metadata={"help": "How ReFT starts.", "choices": ["identity", "pyreft"]}
    )
    train_rows: int | None = field(default=None, metadata={"help": "Train on so many rows, drawn at random."})
    eval_rows: int | None = field(default=None, metadata={"help": "Evaluate so many rows a task, drawn at random."})
    dtype: str | None = field(
        default=None,
        metadata={"help": "Load the base model in this dtype.", "choices": ["bfloat16", "float16", "float32"]},
    )
    eval_only: bool = field(default=False, metadata={"help": "Do not train: evaluate what is there, or --adapter."})
    adapter: str | None = field(
        default=None, metadata={"help": "With --eval_only: hub id or path of another adapter than the run's own."}
    )
    quick: bool = field(
        default=False, metadata={"help": "A small run on the data and the models that come along, offline."}
    )

    def __post_init__(self) -> None:
        if self.adapter is not None and not self.eval_only:
            raise ValueError(f"--adapter {self.adapter} is for --eval_only: a run trains an adapter of its own.")


Arguments = TypeVar("Arguments", bound=PaperArguments)
Training = TypeVar("Training", bound=TrainingArguments)


def parse(
    argv: Sequence[str] | None,
    arguments_type: type[Arguments],
    training_type: type[Training],
    suite: str,
    defaults: dict[str, Any],
    quick: dict[str, Any],
    task: str | None = None,
) -> tuple[Arguments, Training, Recipe]:
    """Arguments of a suite, or of one task of it: the command line's, else `quick`'s, the preset's or `defaults`."""
    # Transformers' words about itself.
    warnings.filterwarnings("ignore", category=FutureWarning)
    asked = first_look(argv, arguments_type)
    preset = asked.preset or ("minilm" if suite == "glue" else "smollm2")
    chosen = recipe(suite, preset, task)
    folder = "-".join([preset, "adapter" if asked.adapter else asked.method, *(["quick"] if asked.quick else [])])
    bf16 = is_torch_bf16_gpu_available()
    parser = HfArgumentParser([arguments_type, training_type])
    parser.set_defaults(
        **{
            "preset": preset,
            "model": chosen.model if isinstance(chosen.model, str) else None,
            "rank": chosen.rank if asked.method in REFT else LORA_RANK,
            "positions": chosen.positions,
            "layers": chosen.layers,
            "share_weights": chosen.share_weights,
            "dropout": chosen.dropout if asked.method in REFT else 0.0,
            "max_length": chosen.max_length,
            "output_dir": str(Path("outputs", "paper", suite, folder)),
            "bf16": bf16,
            "dtype": "bfloat16" if bf16 and suite != "glue" and asked.method != "full" else "float32",
            "gradient_checkpointing": False,
            "per_device_eval_batch_size": 32,
            "logging_steps": 10,
            "save_strategy": "epoch",
            "save_total_limit": 1,
            "dataloader_pin_memory": torch.cuda.is_available(),
            "disable_tqdm": not sys.stderr.isatty(),
            "report_to": ["none"],
        }
        | defaults
        | chosen.training
        | ({"learning_rate": LEARNING_RATES[asked.method]} if asked.method not in REFT else {})
        | (quick if asked.quick else {})
    )
    arguments, training = parser.parse_args_into_dataclasses(argv)
    if arguments.model is None:
        arguments.model = str(chosen.model())
    # Bars where nobody sees them move.
    datasets.disable_progress_bars()
    if not sys.stderr.isatty():
        disable_progress_bar()
    return arguments, training, chosen


def first_look(argv: Sequence[str] | None, arguments_type: type[Arguments]) -> Arguments:
    """The suite's own arguments, without the preset's values. Leaves --help to the parser that knows all flags."""
    parser = HfArgumentParser(arguments_type, add_help=False)
    return parser.parse_args_into_dataclasses(argv, return_remaining_strings=True)[0]


def adapter_config(arguments: PaperArguments, task_type: str) -> PeftConfig | None:
    """The adapter that `--method` and its options name."""
    return peft_config(
        arguments.method,
        task_type,
        arguments.rank,
        arguments.positions,
        arguments.layers,
        arguments.share_weights,
        arguments.dropout,
        arguments.init_weights,
    )


def read_rows(path: Path) -> list[Row]:
    """Rows of a file of JSON lines, gzip-compressed or not, or of one JSON list."""
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if path.suffix == ".json":
            return json.load(file)
        return [json.loads(line) for line in file if line.strip()]


def find_file(folder: Path, names: Sequence[str]) -> Path | None:
    """The first of `names` that exists."""
    return next((folder / name for name in names if (folder / name).exists()), None)


def is_folder(data: str | None) -> bool:
    """Whether data lie in a folder, rather than on the hub."""
    if data is None:
        raise SystemExit("Which data? --data FOLDER or --data NAME-ON-THE-HUB; --quick has some of its own.")
    if data.startswith((".", "/", "~")) and not Path(data).expanduser().is_dir():
        raise SystemExit(f"--data {data}: there is no such folder.")
    return Path(data).expanduser().is_dir()


def draw(rows: list[Row], number: int | None) -> list[Row]:
    """`number` rows in their order, the same ones for every method and seed."""
    if number is None or number >= len(rows):
        return rows
    return [rows[i] for i in sorted(random.Random(42).sample(range(len(rows)), number))]


# What may differ between the runs of one folder: it does not change what is trained.
_NOT_TRAINING = {
    *("eval_only", "adapter", "quick", "tasks", "eval_rows", "eval_data", "max_new_tokens"),
    *("output_dir", "logging_dir", "disable_tqdm", "per_device_eval_batch_size", "save_steps", "save_total_limit"),
    *("dataloader_pin_memory", "dataloader_num_workers", "report_to", "run_name", "project", "trackio_space_id"),
}


class Run:
    """The folder of one run: `configuration.json`, checkpoints, `adapter/`, `training.json` and `results.json`."""

    def __init__(
        self, suite: str, folder: Path, arguments: PaperArguments, training: TrainingArguments, task_type: str
    ) -> None:
        self.suite, self.folder, self.arguments, self.training = suite, folder, arguments, training
        self.adapter = adapter_config(arguments, task_type)
        self.configuration = jsonable(
            {
                "arguments": asdict(arguments),
                "training_arguments": training.to_dict(),
                "adapter": None if self.adapter is None else self.adapter.to_dict(),
            }
        )
        self.training_file = folder / "training.json"
        self.configuration_file = folder / "configuration.json"
        if arguments.adapter is None and (self.training_file.exists() or last_checkpoint(folder)):
            self._compare(json.loads(self.configuration_file.read_text()))
        if not arguments.eval_only:
            folder.mkdir(parents=True, exist_ok=True)
            self.configuration_file.write_text(json.dumps(self.configuration, indent=2))

    def _compare(self, old: dict[str, Any]) -> None:
        """Refuse to resume or evaluate a run that was trained with other settings."""
        evaluates = self.arguments.eval_only
        may_differ = _NOT_TRAINING | ({"data", "dtype"} if evaluates else set())
        new = self.configuration["arguments"] | ({} if evaluates else self.configuration["training_arguments"])
        new |= {"seed": self.training.seed}  # it also splits GLUE's validation sets
        before = old["training_arguments"] | old["arguments"]
        for name, value in new.items():
            if name not in may_differ and before.get(name, value) != value:
                raise SystemExit(
                    f"{self.folder} holds a run with {name} = {before[name]}, this one has {value}: "
                    + ("evaluate it with that." if evaluates else "choose another --output_dir, or delete that one.")
                )
        if evaluates:
            self.configuration["training_arguments"] = old["training_arguments"] | {"output_dir": str(self.folder)}

    @property
    def trains(self) -> bool:
        """Whether there is something left to train."""
        return not self.arguments.eval_only and not self.training_file.exists()

    @property
    def trained_folder(self) -> str:
        """Where the trained adapter, or the finetuned model, is."""
        if self.arguments.adapter is not None:
            return self.arguments.adapter
        folder = self.folder / "adapter"
        if not folder.exists():
            raise SystemExit(f"There is nothing to evaluate in {self.folder}. Train first, or name an --adapter.")
        return str(folder)

    @property
    def saved_at(self) -> float | None:
        """When what is evaluated was saved, if that is on this machine."""
        folder = Path(self.arguments.adapter or self.folder / "adapter")
        return max((file.stat().st_mtime for file in folder.glob("*.safetensors")), default=None)

    def train(self, trainer: Trainer) -> None:
        """Train, from the last checkpoint if there is one; save what was trained, and how it went."""
        checkpoint = last_checkpoint(self.folder)
        if checkpoint is not None:
            print(f"Resuming from {checkpoint}")
        parameters = count_parameters(trainer.model)
        print(f"{self.arguments.method}: {parameters['trainable_parameters']:,} trainable parameters")
        with measured() as cost:
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        trainer.save_model(str(self.folder / "adapter"))
        record = {
            **parameters,
            "cost": cost,
            "resumed": checkpoint is not None,
            "log": trainer.state.log_history,
        }
        self.training_file.write_text(json.dumps(jsonable(record)))
        print(f"Trained in {cost['seconds']:.0f} s; saved to {self.folder / 'adapter'}")

    def write(self, model: PreTrainedModel | PeftModel, scores: dict[str, Any], evaluation: dict[str, float]) -> dict:
        """Write `results.json`. `scores` is part of it, `evaluation` what the evaluation cost."""
        other = self.arguments.adapter
        training = json.loads(self.training_file.read_text()) if other is None and self.training_file.exists() else {}
        if other is not None and isinstance(model, PeftModel):
            self.configuration["adapter"] = jsonable(model.active_peft_config.to_dict())
        parameters = count_parameters(model)
        parameters |= {name: training[name] for name in parameters if name in training}
        results = {
            "suite": self.suite,
            **{name: getattr(self.arguments, name) for name in ("preset", "model", "method", "data")},
            "seed": self.training.seed,
            **scores,
            **parameters,
            "trainable_percent": 100 * parameters["trainable_parameters"] / parameters["base_parameters"],
            "adapter_bytes": stored_bytes(Path(other or self.folder / "adapter")),
            **{
                name: {"train": training.get("cost", {}).get(name), "evaluate": evaluation[name]}
                for name in ("seconds", "processor_seconds", "peak_memory_mib")
            },
            "resumed": training.get("resumed", False),
            "machine": machine(),
            "versions": versions("trl", "peft-reft"),
            "configuration": self.configuration,
            "log": training.get("log", []),
        }
        write_json(self.folder / "results.json", results)
        return results


def last_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint: the trainer writes its state after everything else."""
    complete = [file.parent for file in folder.glob(f"checkpoint-*/{TRAINER_STATE_NAME}")]
    return max(complete, key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]), default=None)


def jsonable(value: Any) -> Any:
    """A value for JSON: sets as lists, other unknown types as text."""
    return json.loads(json.dumps(value, default=lambda odd: sorted(odd) if isinstance(odd, set) else str(odd)))


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"Wrote {path}")


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer. A missing padding token becomes the unknown-word token, as in the paper, else the end token."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def load_trained(load: Callable[[str], PreTrainedModel], run: Run) -> PreTrainedModel | PeftModel:
    """The base model with what was trained in a run."""
    if run.adapter is None:
        return load(run.trained_folder)
    # Trainable, so that the parameters can be counted.
    return PeftModel.from_pretrained(load(run.arguments.model), run.trained_folder, is_trainable=True)


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Trainable parameters, those of them in a classification head, and those of the base model with its head."""
    every = sum(parameter.numel() for parameter in model.parameters())
    trainable = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.requires_grad}
    head = sum(number for name, number in trainable.items() if "classifier." in name or "score." in name)
    adapter = sum(trainable.values()) if isinstance(model, PeftModel) else 0
    return {
        "trainable_parameters": sum(trainable.values()),
        "head_parameters": head,
        "base_parameters": every - adapter,
    }


def stored_bytes(folder: Path) -> int:
    """Size of the weights that were saved; 0 if they are not on this machine."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextmanager
def measured() -> Iterator[dict[str, float]]:
    """Seconds, processor seconds and peak memory of the block: the GPU's, or else that of the whole process."""
    cost: dict[str, float] = {}
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")
    begin, processor = time.perf_counter(), time.process_time()
    yield cost
    cost["seconds"] = time.perf_counter() - begin
    cost["processor_seconds"] = time.process_time() - processor
    cost["peak_memory_mib"] = _peak_bytes() / MIB


def _peak_bytes() -> int:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        return 1024 * next(int(line.split()[1]) for line in status.read_text().splitlines() if "VmHWM" in line)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
