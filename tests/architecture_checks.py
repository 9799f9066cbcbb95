"""What is checked of every architecture: each check compares with the base model, rows alone, or Transformers' own
hidden states, and knows nothing of how the package finds its sites.

A check returns None where everything holds, or what it could not look at; it raises AssertionError for a fault.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from shrunk import value_of
from subjects import LANGUAGE_MODELS, Subject, main_output, tokens
from torch import nn

from peft_reft import ReftConfig
from peft_reft.layer import layers
from peft_reft.layouts import first_tensor
from peft_reft.stacks import block_lists, streams_of

TASKS = {"causal": "CAUSAL_LM", "multimodal": "CAUSAL_LM", "sequence": "SEQ_2_SEQ_LM", "classifier": "SEQ_CLS"}
COMPONENTS = ("block_input", "attention_output", "mlp_output")
_OF_OTHERS = ("attach", "edits", "train", "tokens", "unload", "lora")
_CLOSE = 1e-4
# model_type -> which of several stacks: what Mimi's encoder hears becomes numbers of codes, which have no gradients.
_CHOSEN = {"mimi": 1}
_OPTIONS = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference, relative to the largest entry of `b`; infinite for other shapes."""
    return float((a - b).abs().max() / (b.abs().max() + 1e-6)) if a.shape == b.shape else float("inf")


class Checks:
    """The checks of one model.

    Args:
        subject: the model.
    """

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        # Frozen as with an adapter: torch's kernels for parameters that are trained may round otherwise.
        self.model = subject.model.requires_grad_(False)
        self.language_model = subject.kind in LANGUAGE_MODELS and not subject.encoder_decoder
        generates = hasattr(self.model, "prepare_inputs_for_generation")
        task = TASKS.get(subject.kind) if subject.takes_tokens else None
        self.task = task if generates or task == "SEQ_CLS" else None
        self.notes: dict[str, Any] = {}
        self.padding_errors: dict[str, float | None] | None = None
        self.settings: dict[str, Any] = {}
        stacks = block_lists(self.model)
        if len({stack.owner[0] for stack in stacks}) > len(streams_of(self.model)):
            # Asked to choose one.
            self.settings["layers_pattern"] = stacks[_CHOSEN.get(self.model.config.model_type, 0)].name

    def all(self) -> dict[str, Callable[[], str | None]]:
        """Name of each check that this model is for -> the check, in the order in which they run."""
        found: dict[str, Callable[[], str | None]] = {"attach": self.attach}
        if self.subject.error is not None:
            return found | {"lora": self.lora}
        found |= {"edits": self.edits, "train": self.train}
        if self.subject.takes_tokens:
            found |= {"tokens": self.lands_on_its_tokens, "padding": self.padding}
        if self.language_model and self.subject.takes_tokens:
            found |= {"checkpointing": self.checkpointing, "generate": self.generate}
        found |= {"save": self.save, "unload": self.unload}
        found |= {component: lambda c=component: self.component(c) for component in COMPONENTS}
        return found | {"lora": self.lora}

    def of_others(self) -> dict[str, Callable[[], str | None]]:
        """As `all`, those that say something new of a class whose family has been checked."""
        return {name: run for name, run in self.all().items() if name in _OF_OTHERS}

    # Models

    def adapted(self, **settings: Any) -> PeftModel:
        """A copy of the model with an adapter, in evaluation mode."""
        torch.manual_seed(1)
        own = {"r": 2, "init_weights": False, "positions": "all", "task_type": self.task}
        return get_peft_model(copy.deepcopy(self.model), ReftConfig(**own | self.settings | settings)).eval()

    def adapted_unless_refused(self, **settings: Any) -> PeftModel | str:
        """As `adapted`; why, where the model has no place for each token."""
        try:
            return self.adapted(**settings)
        except ValueError as refusal:
            if "has no meaning at" not in str(refusal):
                raise
            return _first_sentence(refusal)

    def run(self, model: nn.Module, **more: Any) -> torch.Tensor:
        with torch.no_grad():
            return main_output(model(**self.subject.inputs | more))

    def _find_positions(self) -> None:
        """Whether padding on the left needs position ids, and how far rows in a batch differ from rows alone."""
        self.padding_errors = {}
        for side in ("right", "left"):
            error = self._padding_error(self.model, side)
            if error is not None and not error < 1e-3 and "position_ids" in self.subject.parameters:
                self.subject.takes_positions = True
                better = self._padding_error(self.model, side)
                self.subject.takes_positions = better is not None and better < error
                error = better if self.subject.takes_positions else error
            self.padding_errors[side] = error

    @torch.no_grad()
    def _padding_error(self, model: nn.Module, side: str) -> float | None:
        """How far rows of a padded batch differ from these rows alone; None where that cannot be told."""
        batch = tokens((8, 5), side)
        try:
            together = main_output(model(**self.subject.told(batch)))
            errors = []
            for i, mask in enumerate(batch["attention_mask"].bool()):
                row = {name: value[i : i + 1, mask] for name, value in batch.items()}
                alone = main_output(model(**self.subject.told(row)))[0]
                mine = together[i]
                if len(mine) == len(mask) and "decoder_input_ids" not in self.subject.inputs and mine.dim() > 1:
                    mine = mine[mask]
                if mine.shape != alone.shape:
                    return None
                errors.append(difference(mine, alone))
        except Exception as error:
            if isinstance(model, PeftModel):
                raise
            self.notes[f"base, padded {side}"] = f"{type(error).__name__}: {error}"[:160]
            return None
        return max(errors)

    # Checks

    def attach(self) -> str | None:
        """Something is edited, in the text part of a multimodal model."""
        model = self.adapted()
        names = [layer.site_name for layer in layers(model)]
        self.notes["sites"] = sorted({_numberless(name) for name in names})
        self.notes["count"] = len(names)
        if self.language_model:
            assert not any(part in name for name in names for part in ("vision", "visual", "audio_tower")), names[0]
        return f"asks for one of several stacks, such as {self.settings['layers_pattern']}" if self.settings else None

    def edits(self) -> str | None:
        """As many layers as the model has are called, and count; without the adapter it is the base."""
        model = self.adapted()
        base = self.run(self.model)
        steady = torch.equal(self.run(self.model), base)
        with calls_of(model) as calls:
            edited = self.run(model)
        uncalled = [name for name, count in calls.items() if count == 0]
        assert not uncalled, f"{len(uncalled)} of {len(calls)} are never called, {uncalled[0]} first"
        if self.language_model:
            # Some apply a layer several times.
            edits, told = sum(calls.values()), _layers_told(self.model.config)
            assert told in (None, edits), f"{edits} edits in {len(calls)} layers, the configuration tells {told}"
        if not steady:
            return "the base model is random"
        assert difference(edited, base) > _CLOSE, "the output stays"
        with model.disable_adapter():
            assert torch.equal(self.run(model), base), "without the adapter it is not the base"
        dead = []
        for layer in layers(model):
            with only(model, layer):
                if torch.equal(self.run(model), base):
                    dead.append(layer.site_name)
        assert not dead, f"{len(dead)} do not count when alone, {dead[0]} first"
        return None

    def train(self) -> str | None:
        """Every parameter of the adapter gets a gradient."""
        self._check_gradients(self.adapted())
        return None

    def lands_on_its_tokens(self) -> str | None:
        """The edit of the first layer is at the told tokens of Transformers' hidden states, and nowhere else."""
        unseen = []
        cases = [("f1+l1", "encoder_hidden_states"), ("c2", "decoder_hidden_states")]
        for spec, field in cases if self.subject.encoder_decoder else [("f1+l1", "hidden_states")]:
            model = self.adapted_unless_refused(positions=spec, layers_to_transform=0)
            if isinstance(model, str):
                unseen.append(f"{spec} is refused: {model}")
                continue
            for lengths in ((8, 5), (8, 8, 5, 8, 3, 8, 8, 8)):
                batch = tokens(lengths, "left")
                states = self._states(model, batch, field)
                if states is None:
                    # A block that is applied several times puts out what it does first before others see it.
                    states = self._outputs(model, batch)
                if states is None:
                    unseen.append(f"no {field}")
                    break
                edited, plain = states
                changed = (edited != plain).any(-1)
                if changed.dim() == 3:  # several streams of each token, behind or before batch and tokens
                    changed = changed.any(-1 if changed.shape[:2] == batch["input_ids"].shape else 0)
                count = batch["input_ids"].shape[1]
                if field != "decoder_hidden_states" and changed.shape[1] > count:
                    # Padded inside the model.
                    assert not changed[:, count:].any(), f"{spec} edits padding"
                    changed = changed[:, :count]
                told = _told(batch["attention_mask"]) if spec == "f1+l1" else _first_two(changed)
                assert changed.shape == told.shape, f"hidden states {tuple(edited.shape)}"
                assert torch.equal(changed, told), f"{spec} edits {changed.int().tolist()}, told {told.int().tolist()}"
        return "; ".join(unseen) or None

    @torch.no_grad()
    def _outputs(self, model: PeftModel, batch: dict) -> tuple[torch.Tensor, torch.Tensor] | None:
        """What an edited block puts out first, edited and not, if that is `[batch, tokens, ...]`."""
        pair, found = [], []
        for layer in layers(model):
            layer.host.register_forward_hook(lambda module, args, output: found.append(first_tensor(output)))
        for context in (ExitStack(), model.disable_adapter()):
            with context:
                model(**self.subject.told(batch))
            pair += found[:1]
            found.clear()
        fits = len(pair) == 2 and all(hidden.shape[:2] == batch["input_ids"].shape for hidden in pair)
        return tuple(pair) if fits else None

    @torch.no_grad()
    def _states(self, model: PeftModel, batch: dict, field: str) -> tuple[torch.Tensor, torch.Tensor] | None:
        found = []
        for context in (ExitStack(), model.disable_adapter()):
            with context, calls_of(model) as calls:
                output = model(**self.subject.told(batch), output_hidden_states=True)
            states = getattr(output, field, None)
            if not isinstance(states, (tuple, list)) or sum(calls.values()) > 1:
                return None
            # PegasusX has its global tokens beside some.
            found.append([state[0] if isinstance(state, tuple) else state for state in states])
        # Models differ in whether the embeddings are among them.
        pairs = [(edited, plain) for edited, plain in zip(*found, strict=True) if edited is not None]
        changed = [(edited, plain) for edited, plain in pairs if not torch.equal(edited, plain)]
        assert changed, f"no edit is in any of {len(pairs)} {field}"
        return changed[0]

    def padding(self) -> str | None:
        """A row in a padded batch is edited as the row alone."""
        skipped = []
        if self.padding_errors is None:
            self._find_positions()
        model = self.adapted_unless_refused(positions="f1+l1+c1" if self.subject.encoder_decoder else "f1+l1")
        model = self.adapted() if isinstance(model, str) else model
        for side, base in self.padding_errors.items():
            if base is None or not base < 1e-3:
                skipped.append(f"{side}: the base model differs " + ("in shape" if base is None else f"by {base:.1g}"))
                continue
            error = self._padding_error(model, side)
            assert error is not None, f"padded {side}: other shapes than the base model"
            assert error < max(_CLOSE, 20 * base), f"padded {side}: rows differ by {error:.2g} (base {base:.1g})"
        return "; ".join(skipped) or None

    def _step(self, model: nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        batch = tokens((8, 5))
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        labels[:, :3] = -100
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        loss = model(**self.subject.told(batch), labels=labels).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    def checkpointing(self) -> str | None:
        """Gradients with both kinds of checkpointing are those without."""
        if not getattr(self.model, "supports_gradient_checkpointing", False):
            return "the base model has none"
        lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type=self.task)
        try:
            self._compare_checkpointed(self.adapted(positions="f1+l1" if self._has_tokens() else "all").train())
        except Exception as fault:
            try:
                self._compare_checkpointed(get_peft_model(copy.deepcopy(self.model), lora).train())
            except Exception as other:
                if type(other) is type(fault):
                    return f"LoRA fails alike: {_first_sentence(fault)[:100]}"
            raise
        return None

    def _compare_checkpointed(self, model: nn.Module) -> None:
        loss, gradients = self._step(model)
        for reentrant in (True, False):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
            again, others = self._step(model)
            model.gradient_checkpointing_disable()
            kind = "reentrant" if reentrant else "non-reentrant"
            assert difference(again.view(1), loss.view(1)) < _CLOSE, f"{kind}: loss {again:.5f}, without {loss:.5f}"
            wrong = [n for n, g in gradients.items() if n not in others or difference(others[n], g) > 1e-3]
            assert not wrong, f"{kind}: {len(wrong)} of {len(gradients)} gradients differ, {wrong[0]} first"

    def generate(self) -> str | None:
        """What is generated is the same with a cache, without, alone, and in one pass over everything."""
        if not getattr(self.model, "can_generate", bool)() or self.task is None:
            return "the base model does not generate"
        batch = tokens((8, 5), "left")
        try:
            plain, base = self._generated(self.model, batch), self._routes(self.model, batch)
        except Exception as error:
            return f"the base model does not generate: {type(error).__name__}"
        model = self.adapted(positions="f1+l1" if self._has_tokens() else "all")
        mine = self._generated(model, batch)
        assert difference(mine, plain) > _CLOSE, "the logits stay"
        skipped = []
        for route, reference in base.items():
            error = None if reference is None else difference(reference, plain)
            if error is None or not error < 1e-3:
                skipped.append(f"{route}: the base model differs")
                continue
            other = difference(self._routes(model, batch)[route], mine)
            assert other < max(_CLOSE, 20 * error), f"{route}: logits differ by {other:.2g} (base {error:.1g})"
        return "; ".join(skipped) or None

    @torch.no_grad()
    def _generated(self, model: nn.Module, batch: dict[str, torch.Tensor], **options: Any) -> torch.Tensor:
        options = _OPTIONS | {"return_dict_in_generate": True, "output_logits": True} | options
        output = model.generate(**batch, **options)
        self.sequences = output.sequences
        return torch.stack(output.logits, 1)

    def _routes(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor | None]:
        """The logits of `_generated` by other ways, None where the base model has no such way."""
        routes: dict[str, Callable[[], torch.Tensor]] = {
            "no cache": lambda: self._generated(model, batch, use_cache=False),
            "alone": lambda: self._alone(model, batch),
            "one pass": lambda: self._in_one_pass(model, batch),
        }
        found = {}
        for name, route in routes.items():
            try:
                found[name] = route()
            except Exception:
                if isinstance(model, PeftModel):
                    raise
                found[name] = None
        return found

    def _alone(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        rows = []
        for i, mask in enumerate(batch["attention_mask"].bool()):
            rows.append(self._generated(model, {name: value[i : i + 1, mask] for name, value in batch.items()}))
        return torch.cat(rows)

    def _in_one_pass(self, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        self._generated(model, batch)
        ids, length = self.sequences, batch["input_ids"].shape[1]
        mask = torch.cat([batch["attention_mask"], torch.ones_like(ids[:, length:])], dim=1)
        more = {}
        if isinstance(model, PeftModel):
            more = {"prompt_mask": torch.zeros_like(mask, dtype=torch.bool)}
            more["prompt_mask"][:, :length] = batch["attention_mask"].bool()
        told = self.subject.told({"input_ids": ids, "attention_mask": mask})
        with torch.no_grad():
            return main_output(model(**told, **more))[:, length - 1 : -1]

    def save(self) -> str | None:
        """A saved adapter, loaded into a fresh model, does the same."""
        model = self.adapted()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            fresh = PeftModel.from_pretrained(copy.deepcopy(self.model), folder).eval()
        if not torch.equal(self.run(model), wanted := self.run(model)):
            return "the base model is random"
        assert torch.equal(self.run(fresh), wanted), "the loaded adapter does something else"
        return None

    def unload(self) -> str | None:
        """`unload` leaves no trace."""
        model, twin = self.adapted(), copy.deepcopy(self.model)
        # Some keep something of their first pass.
        self.run(model), self.run(twin)
        back = model.unload()
        for (name, mine), (_, other) in zip(back.named_modules(), twin.named_modules(), strict=True):
            left = vars(mine).keys() ^ vars(other).keys()
            assert not left, f"{name} has or lacks {sorted(left)}"
            for kind in ("_forward_hooks", "_forward_pre_hooks"):
                assert len(getattr(mine, kind)) == len(getattr(other, kind)), f"{name} has other {kind}"
        states, wanted = back.state_dict(), twin.state_dict()
        assert states.keys() == wanted.keys(), "the parameters have other names"
        assert all(torch.equal(states[name], wanted[name]) for name in wanted), "the parameters have other values"
        base = self.run(self.model)
        if torch.equal(self.run(self.model), base):
            assert torch.equal(self.run(back), base), "it is not the base"
        return None

    def component(self, name: str) -> str | None:
        """A component is edited in all layers that have it; each is called, and counts."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                model = self.adapted(component=name)
            except ValueError as refusal:
                reason = str(refusal)
                assert "was not found in any of the layers" in reason, reason
                return reason.partition("layers to edit ")[2].partition(". Name")[0]
        names = [layer.site_name for layer in layers(model)]
        self.notes[name] = sorted({_numberless(site) for site in names})
        skipped = [str(w.message) for w in said if "passed over" in str(w.message)]
        base = self.run(self.model)
        with calls_of(model) as calls:
            edited = self.run(model)
        uncalled = [site for site, count in calls.items() if count == 0]
        assert not uncalled, f"{len(uncalled)} of {len(calls)} are never called, {uncalled[0]} first"
        if torch.equal(self.run(self.model), base):
            assert difference(edited, base) > _CLOSE, "the output stays"
            for layer in layers(model):
                with only(model, layer):
                    assert not torch.equal(self.run(model), base), f"{layer.site_name} alone does not count"
        self._check_gradients(model)
        return skipped[0].partition("passed over ")[2] if skipped else None

    def lora(self) -> str | None:
        """LoRA attaches and edits."""
        config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, task_type=self.task)
        model = get_peft_model(copy.deepcopy(self.model), config).eval()
        if self.subject.error is not None:
            return "the base model does not run"
        base = self.run(self.model)
        assert not torch.equal(self.run(model), base), "the output stays"
        return None

    def _check_gradients(self, model: nn.Module) -> None:
        """Every parameter of the adapter gets a gradient."""
        output = main_output(model.train()(**self.subject.inputs))
        torch.manual_seed(0)
        # A random direction: the square of what a normalization puts out is always the same.
        (output * torch.randn_like(output)).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        wrong = [name for name, g in gradients.items() if g is None or not torch.isfinite(g).all()]
        assert not wrong, f"{len(wrong)} of {len(gradients)} gradients are missing or not finite, {wrong[0]} first"
        zero = [name for name, gradient in gradients.items() if not gradient.any()]
        assert not zero, f"{len(zero)} of {len(gradients)} gradients are zero, {zero[0]} first"

    def _has_tokens(self) -> bool:
        """Whether words that count tokens have a meaning in the model."""
        return not isinstance(self.adapted_unless_refused(positions="f1+l1"), str)


@contextmanager
def calls_of(model: nn.Module) -> Iterator[dict[str, int]]:
    """Name of each edited module -> how often it edits, counted at its layer's own method."""
    calls: dict[str, int] = {}
    for layer in layers(model):
        calls[layer.site_name] = 0
        layer._edited = _counting(calls, layer.site_name, layer._edited)
    try:
        yield calls
    finally:
        for layer in layers(model):
            del layer._edited


def _counting(calls: dict[str, int], name: str, method: Callable) -> Callable:
    def counted(*args: Any) -> Any:
        calls[name] += 1
        return method(*args)

    return counted


@contextmanager
def only(model: nn.Module, chosen: nn.Module) -> Iterator[None]:
    """While it lasts, one layer alone edits."""
    others = [layer for layer in layers(model) if layer is not chosen]
    for layer in others:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in others:
            layer._disable_adapters = False


def _numberless(name: str) -> str:
    return ".".join("N" if part.isdigit() else part for part in name.split("."))


# model_type -> the field of the configuration that counts layers, where the usual one counts their attentions.
_LAYERS = {"longcat_flash": "num_layers"}


def _layers_told(config: Any) -> int | None:
    """Number of layers that a configuration tells."""
    usual = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "layers")
    names = [_LAYERS[config.model_type]] if config.model_type in _LAYERS else usual
    values = (value_of(part, name) for part in (config.get_text_config(), config) for name in names)
    return next((value for value in values if isinstance(value, int)), None)


def _told(mask: torch.Tensor) -> torch.Tensor:
    """The first and the last real token of each row."""
    told = torch.zeros_like(mask, dtype=torch.bool)
    for row, real in zip(told, mask, strict=True):
        places = real.nonzero().flatten()
        row[places[0]] = row[places[-1]] = True
    return told


def _first_two(changed: torch.Tensor) -> torch.Tensor:
    told = torch.zeros_like(changed)
    told[:, :2] = True
    return told


def _first_sentence(error: Exception) -> str:
    return str(error).partition(". ")[0]
