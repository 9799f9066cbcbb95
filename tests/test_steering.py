"""Strength, subspaces, directions and edit norms: the adapter that finetunes also interprets and steers."""

from __future__ import annotations

import json
from fractions import Fraction

import numpy as np
import pytest
import tiny
import torch
from adapters import IDS, generated, logits, reft
from peft import PeftModel, get_peft_model
from reference import edited, gram_schmidt

from peft_reft import EditNorms, ReftConfig, ReftLayer, directions_from_pairs, edit_norms

BLOCKS = "base_model.model.model.layers"


def wrap(base=None, **settings) -> PeftModel:
    base = tiny.llama() if base is None else base
    with torch.random.fork_rng():
        torch.manual_seed(11)
        return get_peft_model(base, reft(**settings)).eval()


def interventions(model, adapter="default") -> dict[int, torch.nn.Module]:
    layers = (module for module in model.modules() if isinstance(module, ReftLayer))
    return {layer.index: layer.reft_intervention[adapter] for layer in layers if adapter in layer.reft_intervention}


@torch.no_grad()
def states(model, ids=IDS, **kwargs) -> list[torch.Tensor]:
    """The output of each block."""
    seen = []
    handles = [
        block.register_forward_hook(lambda module, args, output: seen.append(output.detach()))
        for block in model.get_base_model().model.layers
    ]
    model(input_ids=ids, **kwargs)
    for handle in handles:
        handle.remove()
    return seen


def base_states(model, ids=IDS) -> list[torch.Tensor]:
    with model.disable_adapter():
        return states(model, ids)


# Strength


def test_strength_zero_is_the_base_model_bit_for_bit():
    model = wrap(dropout=0.5)
    with model.disable_adapter():
        expected, tokens = logits(model), generated(model)
    model.set_strength("default", 0)
    assert torch.equal(logits(model), expected)
    assert torch.equal(generated(model), tokens)
    model.train()
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("strength", [-2.0, 0.5, 3.0])
@pytest.mark.parametrize("positions", ["f2+l2", "all"])
def test_strength_scales_the_edit_of_a_layer(strength, positions):
    model = wrap(positions=positions, layers_to_transform=[1])
    base, whole = base_states(model)[1], states(model)[1]
    with model.rescaled("default", strength):
        scaled = states(model)[1]
    torch.testing.assert_close(scaled - base, strength * (whole - base), atol=1e-5, rtol=1e-5)


def test_strength_is_set_for_one_adapter_and_back_again_after_the_block():
    model = wrap()
    model.add_adapter("other", reft(layers_to_transform=[0]))
    model.base_model.set_adapter(["default", "other"])
    both = logits(model)
    model.base_model.set_adapter("default")
    alone = logits(model)
    model.base_model.set_adapter(["default", "other"])
    with model.rescaled("other", 0):
        torch.testing.assert_close(logits(model), alone)
    assert torch.equal(logits(model), both)
    with pytest.raises(RuntimeError), model.rescaled("other", 0):
        raise RuntimeError
    assert torch.equal(logits(model), both)


NOT_FINITE = [float("nan"), float("inf"), -float("inf"), 1e39, -(10**400), torch.tensor(torch.nan), np.float32("inf")]


@pytest.mark.parametrize("strength", NOT_FINITE, ids=lambda value: str(value)[:10])
def test_a_strength_that_is_not_finite_is_refused_and_nothing_changes(strength):
    model = wrap()
    before = logits(model)
    with pytest.raises(ValueError, match="strength must be finite"):
        model.set_strength("default", strength)
    with pytest.raises(ValueError, match="strength must be finite"), model.rescaled("default", strength):
        pytest.fail("the block was entered")
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("strength", ["0.5", None, True, [1.0], 1j, torch.ones(2), {}])
def test_a_strength_that_is_no_number_is_refused(strength):
    with pytest.raises(TypeError, match=r"strength must be a number, got .* of type"):
        wrap().set_strength("default", strength)


@pytest.mark.parametrize("strength", [2, np.float32(2), torch.tensor(2.0), torch.tensor([2]), Fraction(2)])
def test_a_strength_may_be_any_kind_of_number(strength):
    model, expected = wrap(), wrap()
    model.set_strength("default", strength)
    expected.set_strength("default", 2.0)
    assert torch.equal(logits(model), logits(expected))


@pytest.mark.parametrize(
    ("weight", "error"), [(float("nan"), ValueError), (float("inf"), ValueError), ("1", TypeError), (None, TypeError)]
)
def test_a_weight_of_a_sum_that_is_no_finite_number_is_refused_and_nothing_is_added(weight, error):
    model = wrap()
    with pytest.raises(error, match="a weight must be"):
        model.add_weighted_adapter(["default"], [weight], "sum")
    assert list(model.peft_config) == ["default"]


class UsersError(Exception):
    pass


def nothing(model):
    pass


def delete(model):
    model.add_adapter("other", reft())
    model.set_adapter("other")
    model.delete_adapter("default")


def replace(model):
    delete(model)
    model.add_adapter("default", reft(subspaces=GROUPS))
    model.set_adapter("default")


def unload(model):
    model.unload()


@pytest.mark.parametrize("change", [nothing, delete, replace, unload], ids=lambda change: change.__name__)
@pytest.mark.parametrize("error", [UsersError, KeyboardInterrupt, SystemExit, None])
@pytest.mark.parametrize("block", ["rescaled", "use_subspaces"])
def test_the_users_error_comes_through_whatever_happened_to_the_adapters(block, error, change):
    model = wrap(subspaces=GROUPS, positions="all")
    before = logits(model)

    def run():
        with getattr(model, block)("default", 0.5 if block == "rescaled" else "style"):
            change(model)
            if error is not None:
                raise error

    if error is None:
        run()
    else:
        with pytest.raises(error):
            run()
    if change is nothing:
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("block", ["rescaled", "use_subspaces"])
def test_a_new_adapter_of_the_old_name_keeps_its_own_settings(block):
    model = wrap(subspaces=GROUPS, positions="all")
    model.set_strength("default", 0.25)
    model.set_subspaces("default", "task")
    with getattr(model, block)("default", 0.5 if block == "rescaled" else "style"):
        replace(model)
        fresh = logits(model)
    assert torch.equal(logits(model), fresh)


def test_an_unknown_adapter_is_named():
    model = wrap()
    for call in (
        lambda: model.set_strength("nobody", 1),
        lambda: model.projection("nobody", 0),
        lambda: model.set_subspaces("nobody", None),
        lambda: model.set_directions("nobody", {}),
    ):
        with pytest.raises(ValueError, match=r"no ReFT adapter 'nobody'; the model has \['default'\]"):
            call()


# Subspaces


def test_subspace_returns_the_orthonormal_rows():
    model = wrap()
    for layer in range(tiny.LAYERS):
        rows = model.projection("default", layer)
        expected = gram_schmidt(interventions(model)[layer].projection[0].double())
        torch.testing.assert_close(rows.double(), expected, atol=1e-6, rtol=0)
        assert torch.equal(model.projection("default", f"layers.{layer}"), rows)


def test_subspace_of_unshared_weights_has_one_for_each_word():
    assert wrap(share_weights=False).projection("default", 0).shape == (2, 4, tiny.HIDDEN)


def test_subspace_asks_for_a_name_where_a_number_is_not_enough():
    model = wrap(component=["attention_output", "mlp_output"])
    with pytest.raises(ValueError, match=r"several places .* 'model.layers.1.self_attn.o_proj', 'model.layers.1.mlp"):
        model.projection("default", 1)
    assert model.projection("default", "layers.1.mlp.down_proj").shape == (4, tiny.HIDDEN)
    with pytest.raises(ValueError, match="Layer 7 is not edited"):
        model.projection("default", 7)


def test_red_has_no_subspace():
    with pytest.raises(ValueError, match="edits each coordinate separately, not a subspace"):
        wrap(intervention="red").projection("default", 0)


GROUPS = {"style": 1, "task": 3}


def test_the_edits_of_all_groups_add_up_to_the_whole():
    model = wrap(subspaces=GROUPS, positions="all", layers_to_transform=[1])
    base, whole = base_states(model)[1], states(model)[1]
    parts = []
    for names in GROUPS:
        with model.use_subspaces("default", names):
            parts.append(states(model)[1] - base)
            rows = model.projection("default", 1)
            outside = rows[1:] if names == "style" else rows[:1]
            torch.testing.assert_close(parts[-1] @ outside.T, torch.zeros(2, 8, len(outside)), atol=1e-5, rtol=0)
    torch.testing.assert_close(sum(parts), whole - base, atol=1e-5, rtol=1e-5)
    assert torch.equal(states(model)[1], whole)


@pytest.mark.parametrize("positions", ["f2+l2", "all", "c2"])
@pytest.mark.parametrize("share_weights", [True, False])
def test_each_row_edits_the_subspaces_that_it_asks_for(positions, share_weights):
    model = wrap(subspaces=GROUPS, positions=positions, share_weights=share_weights)
    ids = torch.randint(3, tiny.VOCAB, (4, 9))
    labels = ids.clone()
    labels[:, :5] = -100
    asked = [["style"], ["task", "style"], [], "task"]
    got = logits(model, ids, labels=labels, subspaces=asked)
    tokens = generated(model, ids, subspaces=asked)
    for row, names in enumerate(asked):
        with model.use_subspaces("default", names):
            torch.testing.assert_close(got[row], logits(model, ids[row : row + 1], labels=labels[row : row + 1])[0])
            assert torch.equal(tokens[row], generated(model, ids[row : row + 1])[0])


def test_rows_of_a_training_batch_train_only_their_subspaces():
    model = wrap(subspaces=GROUPS, positions="all").train()
    model(input_ids=IDS, labels=IDS, subspaces=[["task"], []]).loss.backward()
    for intervention in interventions(model).values():
        for parameter in intervention.parameters():
            assert not parameter.grad[:, 0].any()
            assert parameter.grad[:, 1:].any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointed_rows_keep_their_subspaces(reentrant):
    def gradients(checkpoint: bool):
        model = wrap(subspaces=GROUPS, positions="all").train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        loss = model(input_ids=IDS, labels=IDS, subspaces=[["task"], ["style"]]).loss
        model(input_ids=IDS, labels=IDS)
        loss.backward()
        return [p.grad for i in interventions(model).values() for p in i.parameters()]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected)


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(steps):
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()


def test_training_a_later_subspace_leaves_an_earlier_one_as_it_is():
    model = wrap(subspaces=GROUPS, positions="all")
    with model.use_subspaces("default", "style"):
        before = logits(model)
    rows = model.projection("default", 1)
    model.set_subspaces("default", "task")
    train(model)
    with model.use_subspaces("default", "style"):
        assert torch.equal(logits(model), before)
    assert not torch.equal(model.projection("default", 1)[1:], rows[1:])


def test_all_subspaces_train_together_by_default():
    model = wrap(subspaces=GROUPS, positions="all")
    before = {n: p.clone() for n, p in model.named_parameters() if p.requires_grad}
    train(model)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert (parameter != before[name]).flatten(1).any(-1).all()


def test_subspaces_are_saved_with_the_adapter(tmp_path):
    model = wrap(subspaces=GROUPS)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["subspaces"] == GROUPS
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    for names in ("style", "task", None):
        model.set_subspaces("default", names)
        loaded.set_subspaces("default", names)
        assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([["style"]], "Length of `subspaces` should be the same as the number of inputs, but got 1 and 2"),
        ([["style"], ["other"]], r"Unknown subspace\(s\) other; the adapters have \['style', 'task'\]"),
    ],
)
def test_rows_that_cannot_be_meant_are_refused(asked, message):
    model = wrap(subspaces=GROUPS)
    expected = logits(model)
    for call in (logits, generated):
        with pytest.raises(ValueError, match=message):
            call(model, subspaces=asked)
    assert torch.equal(logits(model), expected)


def test_an_unknown_subspace_is_refused():
    with pytest.raises(ValueError, match=r"has no subspace 'other'; it has \['style', 'task'\]"):
        wrap(subspaces=GROUPS).set_subspaces("default", ["other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subspaces": {"a": 3, "b": 3}}, "have 6 dimensions in all, but r=4"),
        ({"subspaces": {"a": 4, "b": 0}}, "must map names to positive integers"),
        ({"subspaces": ["a"]}, "must map names to positive integers"),
        ({"subspaces": {"a": 4}, "intervention": "red"}, "'red' edits each coordinate separately"),
        ({"freeze_subspace": True, "intervention": "red"}, "'red' edits each coordinate separately"),
        ({"freeze_subspace": "yes"}, "freeze_subspace must be True or False"),
        ({"act_fn": "relu", "intervention": "consreft"}, "'consreft' has no learned projection"),
        ({"act_fn": "prelu"}, "has its own parameters"),
    ],
)
def test_contradictory_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ReftConfig(**{"r": 4} | settings)


# Directions


def test_directions_become_the_subspace_and_change_nothing_yet():
    model = wrap(r=2, positions="all")
    with model.disable_adapter():
        expected = logits(model)
    directions = torch.randn(2, tiny.HIDDEN)
    model.set_directions("default", dict.fromkeys(range(tiny.LAYERS), directions))
    torch.testing.assert_close(logits(model), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.projection("default", 1), gram_schmidt(directions), atol=1e-6, rtol=0)


@pytest.mark.parametrize("trainable", [False, True])
def test_a_frozen_subspace_stays_through_training_saving_and_more_training(trainable, tmp_path):
    model = wrap(r=2, positions="all")
    directions = torch.randn(2, tiny.HIDDEN)
    model.set_directions("default", dict.fromkeys(range(tiny.LAYERS), directions), trainable=trainable)
    before = logits(model)
    train(model)
    assert not torch.equal(logits(model), before)
    assert torch.equal(interventions(model)[1].projection[0], directions) != trainable

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path, is_trainable=True)
    # Switching adapters makes the active one trainable.
    loaded.add_adapter("other", reft())
    loaded.set_adapter("other")
    loaded.set_adapter("default")
    train(loaded)
    assert not torch.equal(logits(loaded), logits(model))
    assert torch.equal(interventions(loaded)[1].projection[0], directions) != trainable


def test_directions_of_a_constant_edit_are_added_as_they_are():
    model = wrap(intervention="lobireft", r=2, positions="all")
    directions = {layer: torch.randn(2, tiny.HIDDEN) for layer in (0, 2)}
    untouched = {name: p.clone() for name, p in interventions(model)[1].named_parameters()}
    model.set_directions("default", directions)
    interventions(model)[1].bias.data.zero_()
    base, steered = base_states(model), states(model)
    torch.testing.assert_close(steered[0], base[0] + directions[0].sum(0), atol=1e-5, rtol=1e-5)
    assert torch.equal(interventions(model)[1].projection, untouched["projection"])
    with model.rescaled("default", -1.5):
        torch.testing.assert_close(states(model)[0], base[0] - 1.5 * directions[0].sum(0), atol=1e-5, rtol=1e-5)


def test_directions_of_a_constant_replacement_are_taken_out():
    model = wrap(intervention="consreft", r=1, positions="all", layers_to_transform=[2])
    direction = torch.randn(tiny.HIDDEN)
    model.set_directions("default", {2: direction})
    unit = direction / direction.norm()
    base = base_states(model)[2]
    torch.testing.assert_close(states(model)[2], base - (base @ unit)[..., None] * unit, atol=1e-5, rtol=1e-5)


def test_directions_may_differ_between_the_words_of_positions():
    model = wrap(intervention="lobireft", r=1, positions="f1+l1", share_weights=False, layers_to_transform=[0])
    directions = torch.randn(2, 1, tiny.HIDDEN)
    model.set_directions("default", {0: directions})
    edit = states(model)[0] - base_states(model)[0]
    torch.testing.assert_close(edit[0, 0], directions[0, 0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(edit[0, -1], directions[1, 0], atol=1e-5, rtol=1e-5)
    assert not edit[:, 1:-1].any()


@pytest.mark.parametrize(
    ("directions", "message"),
    [
        (
            {0: torch.ones(3, tiny.HIDDEN)},
            r"directions of layer 0 are \(3, 32\), but the adapter's subspace .* \(2, 32\)",
        ),
        ({1: torch.ones(2, tiny.HIDDEN)}, "directions of layer 1 are not finite, or not linearly independent"),
        ({1: torch.full((2, tiny.HIDDEN), float("nan"))}, "not finite"),
        ({9: torch.randn(2, tiny.HIDDEN)}, "Layer 9 is not edited"),
    ],
)
def test_directions_that_span_no_subspace_are_refused_before_anything_is_set(directions, message):
    model = wrap(r=2)
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model.set_directions("default", {2: torch.randn(2, tiny.HIDDEN)} | directions)
    assert torch.equal(logits(model), before)


class Letters:
    """A tokenizer: one token per letter."""

    all_special_ids = ()

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(letter) % 50 for letter in text]}


def test_directions_are_those_of_the_base_model_and_leave_no_hooks():
    texts = ["good", "very good indeed", "fine"] * 7, ["bad", "awful", "poor"] * 7
    model = wrap()
    got, expected = (directions_from_pairs(m, Letters(), *texts, layers=[0, -1]) for m in (model, tiny.llama()))
    assert list(got) == [0, -1]
    assert all(torch.equal(got[layer], expected[layer]) for layer in got)
    assert got[0].shape == (1, tiny.HIDDEN)
    assert all(len(block._forward_hooks) == 1 for block in model.get_base_model().model.layers)


@pytest.mark.parametrize(
    ("texts", "layers", "message"),
    [
        (([], ["a"]), [0], "Texts of both kinds are needed, got 0 positive and 1 negative"),
        ((["a"], [""]), [0], "The text '' has no tokens"),
        ((["a"], ["b"]), [3], "There is no layer 3: 'model.layers' has 3"),
    ],
)
def test_pairs_that_give_no_direction_are_refused(texts, layers, message):
    with pytest.raises(ValueError, match=message):
        directions_from_pairs(tiny.llama(), Letters(), *texts, layers=layers)


# Norms


def test_norms_print_as_a_line_for_each_row_and_place():
    values = torch.tensor([[[0.5, 0.0], [0.0, 0.0], [0.25, 0.0]]])
    assert str(EditNorms(values, ("layers.0", "layers.1"))) == (
        "row 0  layers.0: 2 of 3 tokens, mean 37.5%, most 50.0% of ||h||\nrow 0  layers.1: 0 of 3 tokens, no edit"
    )


@pytest.mark.parametrize("component", ["block_output", "block_input", "mlp_output"])
def test_edit_norms_are_relative_to_what_is_edited(component):
    model = wrap(positions="f1+l2", component=component, layers_to_transform=[1])
    norms = edit_norms(model, {"input_ids": IDS})
    assert norms.values.shape == (2, 8, 1)
    assert not norms.values[:, 1:-2].any()

    seen = []
    block = model.get_base_model().model.layers[1]
    with model.disable_adapter(), torch.no_grad():
        if component == "block_input":
            handle = block.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        else:
            module = block if component == "block_output" else block.mlp.down_proj
            handle = module.register_forward_hook(lambda module, args, output: seen.append(output))
        model(input_ids=IDS)
        handle.remove()
    params = {name: p[0].detach() for name, p in interventions(model)[1].named_parameters()}
    for row in range(2):
        for token in (0, 6, 7):
            h = seen[0][row, token]
            expected = (edited("loreft", h, params) - h).norm() / h.norm()
            torch.testing.assert_close(norms.values[row, token, 0], expected, atol=1e-5, rtol=1e-4)


def test_edit_norms_follow_labels_and_leave_no_hooks():
    model = wrap(positions="l1")
    labels = IDS.clone()
    labels[:, :3] = -100
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    norms = edit_norms(model, {"input_ids": IDS, "labels": labels})
    assert norms.places == tuple(f"model.layers.{i}" for i in range(tiny.LAYERS))
    assert norms.values[:, 2].all()
    assert not norms.values[:, [0, 1, 3, 4, 5, 6, 7]].any()
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks


def test_edit_norms_of_an_encoder_decoder_model_ask_for_the_stack():
    model = wrap(tiny.ZOO["t5"].build(), positions="all", task_type="SEQ_2_SEQ_LM")
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :3]}
    with pytest.raises(ValueError, match="both stacks; choose one"):
        edit_norms(model, inputs)
    assert edit_norms(model, inputs, stream="encoder").values.shape[:2] == (2, 8)
    assert edit_norms(model, inputs, stream="decoder").values.shape[:2] == (2, 3)


def test_the_heatmap_shows_the_norms_of_one_row():
    norms = edit_norms(wrap(), {"input_ids": IDS})
    axes = norms.plot(tokens=list("abcdefgh"), row=1).axes[0]
    torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), norms.values[1].T)
    assert [label.get_text() for label in axes.get_xticklabels()] == list("abcdefgh")
    assert [label.get_text() for label in axes.get_yticklabels()] == list(norms.places)


def test_a_model_without_adapters_has_no_edits():
    with pytest.raises(ValueError, match="no ReFT adapters"):
        edit_norms(tiny.llama(), {"input_ids": IDS})


# What is set holds for whole passes, and is what was asked for


def test_subspaces_keep_their_coordinates_whatever_the_order_of_their_names(tmp_path):
    model = wrap(subspaces={"task": 1, "style": 3})
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny.llama(), tmp_path)
    for names in ("style", "task"):
        with model.use_subspaces("default", names), loaded.use_subspaces("default", names):
            assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("component", ["attention_output", "block_output"])
def test_what_was_set_in_the_forward_pass_holds_in_its_replay(component, reentrant):
    def gradients(checkpoint: bool):
        model = wrap(subspaces=GROUPS, positions="all", component=component).train()
        if checkpoint:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        with model.use_subspaces("default", "task"), model.rescaled("default", 0.5):
            loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        return [p.grad for i in interventions(model).values() for p in i.parameters()]

    for got, expected in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(got, expected)


def test_strength_zero_in_training_gives_gradients_of_zero():
    model = wrap(positions="all").train()
    model.set_strength("default", 0)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for i in interventions(model).values() for p in i.parameters())


def test_layers_count_from_the_end_too():
    model = wrap(r=1)
    assert torch.equal(model.projection("default", -1), model.projection("default", tiny.LAYERS - 1))
    texts = (["good", "fine"], ["bad", "awful"])
    directions = directions_from_pairs(model, Letters(), *texts, layers=[-1])
    model.set_directions("default", directions)
    direction = directions[-1] / directions[-1].norm()
    torch.testing.assert_close(model.projection("default", tiny.LAYERS - 1), direction)


def test_measuring_leaves_every_module_in_its_mode():
    model = wrap().train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    edit_norms(model, {"input_ids": IDS})
    directions_from_pairs(model, Letters(), ["a"], ["b"], layers=[0])
    assert [module.training for module in model.modules()] == modes


def test_adapters_that_train_whole_modules_are_not_added():
    model = wrap(modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match=r"'default' trains whole modules or tokens .* cannot be added"):
        model.add_weighted_adapter(["default"], [1.0], "sum")
