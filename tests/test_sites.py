"""Where the edit lands: the modules that a config selects, in tiny random models of every family."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

import pytest
import tiny
import torch
import transformers
from adapters import layers_of
from peft import get_peft_model
from tiny import EOS, IMAGE_TOKEN, LAYERS, PAD, VOCAB, ZOO
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peft_reft import ReftConfig, ReftLayer

BOUNDED = "f2+l1"
ENCODER_DECODER = [name for name, model in ZOO.items() if model.encoder]
LENGTHS = (7, 5)


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    """Two sequences of 7 and 5 tokens, the shorter one padded on the right; a second stream gets 4 tokens each."""
    ids = torch.randint(10, VOCAB, (2, LENGTHS[0]))
    mask = torch.ones_like(ids)
    for row, length in enumerate(LENGTHS):
        ids[row, length - 1] = EOS  # BART classifies at the end of the sequence
        ids[row, length:], mask[row, length:] = PAD, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    if ZOO[name].encoder and ZOO[name].task_type:
        inputs["decoder_input_ids"] = torch.randint(10, VOCAB, (2, 4))
    return inputs


def adapted(base: nn.Module, **settings) -> nn.Module:
    """`base` with a random adapter of rank 2, in evaluation mode."""
    return get_peft_model(base, ReftConfig(**{"r": 2, "init_weights": False} | settings)).eval()


def sites_of(model: nn.Module) -> list[str]:
    """Names of the edited modules, as the base model has them."""
    names = (name for name, module in model.named_modules() if isinstance(module, ReftLayer))
    return [name.removeprefix("base_model.model.").removesuffix(".reft") for name in names]


def hidden_of(output) -> torch.Tensor:
    if isinstance(output, Mapping):
        output = tuple(output.values())
    return output if isinstance(output, torch.Tensor) else output[0]


def watch(model: nn.Module, names: list[str]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Outputs of the named modules before and after all hooks that they have now; filled in each forward pass."""
    before, after = {}, {}
    for name in names:
        module = model.get_submodule(name)

        def record(module, args, output, store, name):
            store[name] = hidden_of(output).detach().clone()

        module.register_forward_hook(lambda *call, name=name: record(*call, before, name), prepend=True)
        module.register_forward_hook(lambda *call, name=name: record(*call, after, name))
    return before, after


def equation_2(hidden: torch.Tensor, intervention: nn.Module, unit: int) -> torch.Tensor:
    """R^T (W h + b - R h) for one representation, row by row of R, which Gram-Schmidt makes orthonormal."""
    hidden = hidden.double()
    rows: list[torch.Tensor] = []
    for row in intervention.projection[unit].detach().double():
        for earlier in rows:
            row = row - (earlier @ row) * earlier
        rows.append(row / row.norm())
    weight, bias = intervention.weight[unit].detach().double(), intervention.bias[unit].detach().double()
    return sum((weight[i] @ hidden + bias[i] - row @ hidden) * row for i, row in enumerate(rows))


def units_at(positions: str, lengths: tuple[int, ...], tokens: int) -> torch.Tensor:
    """Which unit edits which token, -1 for none, with padding on the right."""
    units = torch.full((len(lengths), tokens), -1)
    for row, length in enumerate(lengths):
        if positions == BOUNDED:
            units[row, :2], units[row, length - 1] = 0, 1
        else:
            units[row, :length] = 0
    return units


def assert_edited(before: torch.Tensor, after: torch.Tensor, layer: ReftLayer, units: torch.Tensor) -> None:
    """`after` is equation 2 of `before` at the tokens that have a unit, and bit-identical to it elsewhere."""
    intervention = layer.reft_intervention["default"]
    assert torch.equal(before[units < 0], after[units < 0])
    for index in (units >= 0).nonzero().tolist():
        at = tuple(index)
        edit = equation_2(before[at], intervention, int(units[at]))
        change = after[at].double() - before[at].double()
        assert edit.norm() > 1e-2
        # The sum h + edit is rounded to float32.
        torch.testing.assert_close(change, edit, rtol=1e-4, atol=1e-5 * float(before.abs().max()))


def stacks_of(name: str, positions: str) -> list[tuple[str, torch.Tensor]]:
    """Names of the stacks that are edited, each with the units of its tokens."""
    model = ZOO[name]
    if not model.encoder:
        return [(model.blocks, units_at(positions, LENGTHS, LENGTHS[0]))]
    encoder = (model.encoder, units_at(positions, LENGTHS, LENGTHS[0]))
    # BART's classifier feeds its decoder with the encoder's tokens, padding included.
    tokens = 4 if model.task_type else LENGTHS[0]
    decoder = (model.blocks, units_at(positions, (tokens, tokens), tokens))
    return {"completion": [decoder], BOUNDED: [encoder]}.get(positions, [encoder, decoder])


CASES = [(name, positions) for name in ZOO for positions in ("all", BOUNDED)]
CASES += [(name, "completion") for name in ENCODER_DECODER]


@pytest.mark.parametrize(("name", "positions"), CASES, ids=["-".join(case) for case in CASES])
def test_the_edit_lands_on_the_asked_tokens_of_the_asked_layer(name, positions):
    base, inputs, stacks = ZOO[name].build(), inputs_of(name), stacks_of(name, positions)
    # PEFT freezes the base, and torch sums in another order where a weight asks for no gradient.
    base.requires_grad_(False)
    blocks = [f"{stack}.{i}" for stack, _ in stacks for i in range(LAYERS)]
    _, plain = watch(base, blocks)
    with torch.no_grad():
        base(**inputs)
    plain = dict(plain)

    model = adapted(
        base, positions=positions, share_weights=False, layers_to_transform=1, task_type=ZOO[name].task_type
    )
    before, after = watch(model.base_model.model, blocks)
    with torch.no_grad():
        model(**inputs)

    assert sites_of(model) == [f"{stack}.1" for stack, _ in stacks]
    for stack, units in stacks:
        edited = f"{stack}.1"
        assert_edited(before[edited], after[edited], base.get_submodule(f"{edited}.reft"), units)
        for other in (f"{stack}.0", f"{stack}.2"):
            assert torch.equal(before[other], after[other])
    first = stacks[0][0]
    assert torch.equal(plain[f"{first}.0"], after[f"{first}.0"])
    assert torch.equal(plain[f"{first}.1"], before[f"{first}.1"])
    assert not torch.equal(plain[f"{first}.2"], after[f"{first}.2"])


@pytest.mark.parametrize("name", ZOO)
def test_by_default_every_layer_is_edited_and_learns_while_the_base_stays(name):
    base, inputs = ZOO[name].build(), inputs_of(name)
    weights = {key: value.clone() for key, value in base.state_dict().items()}
    model = adapted(base, positions="all", task_type=ZOO[name].task_type)
    assert set(sites_of(model)) == {f"{stack}.{i}" for stack, _ in stacks_of(name, "all") for i in range(LAYERS)}

    hidden_of(model(**inputs)).square().mean().backward()
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    edits = [key for key in trainable if ".modules_to_save." not in key]
    assert len(edits) == 3 * len(sites_of(model))
    assert all(".reft.reft_intervention.default." in key for key in edits)
    for key, parameter in trainable.items():
        assert parameter.grad.isfinite().all(), key
        assert parameter.grad.any(), key
    assert all(p.grad is None for key, p in model.named_parameters() if key not in trainable)
    # Not the head: as with LoRA, unload leaves the trained one.
    torch.optim.SGD([trainable[key] for key in edits], lr=0.1).step()
    after = model.unload().state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(value, after[key]) for key, value in weights.items())


@pytest.mark.parametrize("name", ["llava", "gemma3_vision", "qwen2_vision"])
def test_the_text_decoder_is_edited_although_the_vision_tower_is_larger(name):
    base = ZOO[name].build()
    in_vision = lambda key: "vis" in key  # noqa: E731
    text = sum(p.numel() for key, p in base.named_parameters() if not in_vision(key))
    assert sum(p.numel() for key, p in base.named_parameters() if in_vision(key)) > text
    assert not any(in_vision(site) for site in sites_of(adapted(base)))


def test_the_tokens_of_an_image_count_as_prompt():
    base = ZOO["llava"].build()
    block = ZOO["llava"].blocks + ".1"
    ids = torch.tensor([[7, *[IMAGE_TOKEN] * 16, 8, 9]])
    model = adapted(base, positions="f3+l1", layers_to_transform=1, task_type="CAUSAL_LM")
    before, after = watch(base, [block])
    model(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=torch.randn(1, 3, 32, 32))
    assert (before[block] != after[block]).any(-1)[0].nonzero().flatten().tolist() == [0, 1, 2, 18]


# Layers


@pytest.mark.parametrize(
    ("layers", "expected"),
    [(0, [0]), (-1, [2]), ([0, -1], [0, 2]), ([2, 1], [1, 2]), ([1, -2], [1]), (None, [0, 1, 2])],
)
def test_layers_count_from_either_end(layers, expected):
    model = adapted(tiny.llama(), layers_to_transform=layers)
    assert sites_of(model) == [f"model.layers.{i}" for i in expected]


@pytest.mark.parametrize("layers", [3, -4, [0, 3]])
def test_a_layer_out_of_range_is_refused_with_the_number_of_layers(layers):
    with pytest.raises(
        ValueError, match=r"there is no layer (3|-4)\. The model has 3 layers in 'model\.layers'; .* -3"
    ):
        adapted(tiny.llama(), layers_to_transform=layers)


def test_layers_pattern_chooses_the_stack():
    settings = {"positions": "all", "layers_to_transform": -1}
    assert sites_of(adapted(ZOO["t5"].build(), layers_pattern="encoder.block", **settings)) == ["encoder.block.2"]
    assert sites_of(adapted(ZOO["t5"].build(), layers_pattern=["decoder.block"], **settings)) == ["decoder.block.2"]
    with_names = adapted(ZOO["t5"].build(), positions="all", layers_pattern="decoder.block", target_modules=["wo"])
    assert sites_of(with_names) == [f"decoder.block.{i}.layer.2.DenseReluDense.wo" for i in range(LAYERS)]


def test_an_unknown_layers_pattern_is_refused_with_the_stacks_there_are():
    with pytest.raises(
        ValueError, match=r"layers_pattern='h' names no stack .* has 'encoder\.block', 'decoder\.block'"
    ):
        adapted(ZOO["t5"].build(), layers_pattern="h")


@pytest.mark.filterwarnings("error:You have passed exclude_modules")
def test_exclude_modules_takes_names_and_regular_expressions():
    assert sites_of(adapted(tiny.llama(), exclude_modules=["layers.1"])) == ["model.layers.0", "model.layers.2"]
    assert sites_of(adapted(tiny.llama(), exclude_modules=r".*layers\.[01]")) == ["model.layers.2"]
    with pytest.raises(ValueError, match=r"exclude_modules='\.\*' removed 3 .* modules_to_save=None 0 of"):
        adapted(tiny.llama(), exclude_modules=".*")


def test_a_module_that_is_saved_whole_is_not_edited():
    assert sites_of(adapted(tiny.llama(), modules_to_save=["layers.0"])) == ["model.layers.1", "model.layers.2"]


# Modules by name


@pytest.mark.parametrize(
    ("name", "target"),
    [
        ("llama", "down_proj"),  # nn.Linear
        ("llama", "input_layernorm"),  # RMSNorm
        ("llama", "self_attn"),  # returns a tuple
        ("llama", "mlp"),
        ("gpt2", "mlp.c_proj"),  # Conv1D
        ("gpt2", "c_fc"),  # wider than the hidden size
        ("gpt2", "wte"),  # nn.Embedding
        ("gpt2", "ln_2"),  # nn.LayerNorm
        ("gpt2", "h.1"),  # a block
        ("bert", "attention.output"),
    ],
)
@pytest.mark.parametrize("positions", ["all", BOUNDED])
def test_a_named_module_is_edited(name, target, positions):
    base, inputs = ZOO[name].build(), inputs_of(name)
    model = adapted(base, target_modules=[target], positions=positions, share_weights=False)
    sites = sites_of(model)
    assert sites
    assert all(site == target or site.endswith(f".{target}") for site in sites)
    before, after = watch(base, sites)
    model(**inputs)
    for site in sites:
        layer = base.get_submodule(f"{site}.reft")
        assert layer.out_features == after[site].shape[-1]
        assert_edited(before[site], after[site], layer, units_at(positions, LENGTHS, LENGTHS[0]))


def test_a_list_of_names_takes_layers_too_and_a_string_is_a_regular_expression():
    by_list = adapted(tiny.llama(), target_modules=["o_proj", "mlp"], layers_to_transform=[0, -1])
    by_string = adapted(tiny.llama(), target_modules=r"model\.layers\.[02]\.(self_attn\.o_proj|mlp)")
    assert sites_of(by_list) == sites_of(by_string)
    assert sites_of(by_list) == [f"model.layers.{i}.{part}" for i in (0, 2) for part in ("self_attn.o_proj", "mlp")]


def test_a_second_adapter_does_not_target_the_first():
    model = adapted(tiny.llama(), target_modules=["mlp"])
    model.add_adapter("second", ReftConfig(target_modules=r".*\.mlp.*", r=2, exclude_modules=r".*act_fn"))
    names = [name for name, module in model.named_modules() if isinstance(module, ReftLayer)]
    assert len(names) == 4 * LAYERS
    assert not any(".reft." in name for name in names)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["nothing"]},
        {"target_modules": ["layers"]},  # an nn.ModuleList returns nothing that could be edited
        {"target_modules": "proj"},
        {"target_modules": ["embed_tokens"], "layers_to_transform": [0]},
    ],
    ids=["name", "container", "regex", "outside_layers"],
)
def test_names_that_match_nothing_are_refused(settings):
    target = re.escape(repr(settings["target_modules"]))
    with pytest.raises(ValueError, match=f"target_modules={target} matches no module"):
        adapted(tiny.llama(), **settings)


def test_a_rank_above_the_width_is_refused():
    with pytest.raises(ValueError, match=r"r=33 is larger than the hidden size 32 of 'model\.layers\.0'"):
        adapted(tiny.llama(), r=33)
    adapted(tiny.llama(), r=33, target_modules=["up_proj"])


def test_a_module_with_a_child_of_the_same_name_is_refused_before_anything_is_touched():
    base = tiny.llama()
    base.model.layers[2].reft = nn.Linear(2, 2)
    modules = [name for name, _ in base.named_modules()]
    with pytest.raises(ValueError, match=r"'model\.layers\.2' already has an attribute 'reft' \(Linear\)"):
        adapted(base)
    assert [name for name, _ in base.named_modules()] == modules
    assert sites_of(adapted(base, exclude_modules=["layers.2"])) == ["model.layers.0", "model.layers.1"]


# Modules of any origin


class Mixer(nn.Module):
    """`[batch, tokens, features]` in and out; its blocks return `wrap` of their output."""

    class Block(nn.Module):
        def __init__(self, wrap):
            super().__init__()
            self.inner = nn.Linear(8, 8)
            self.out_features = 8
            self.wrap = wrap

        def forward(self, hidden):
            return self.wrap(self.inner(hidden))

    def __init__(self, wrap=lambda hidden: hidden):
        super().__init__()
        self.first, self.second = Mixer.Block(wrap), Mixer.Block(wrap)

    def forward(self, inputs_embeds):
        return hidden_of(self.second(hidden_of(self.first(inputs_embeds))))


class Pair(NamedTuple):
    hidden: torch.Tensor
    extra: str


WRAPS = {
    "tensor": lambda hidden: hidden,
    "tuple": lambda hidden: (hidden, "extra"),
    "list": lambda hidden: [hidden, "extra"],
    "named_tuple": lambda hidden: Pair(hidden, "extra"),
    "dict": lambda hidden: {"hidden": hidden, "extra": "extra"},
    "model_output": lambda hidden: BaseModelOutput(last_hidden_state=hidden),
}


@pytest.mark.parametrize("positions", ["all", "prompt", BOUNDED])
@pytest.mark.parametrize("wrap", WRAPS)
def test_the_first_value_of_any_output_is_edited_and_its_type_stays(wrap, positions):
    base = Mixer(WRAPS[wrap]).eval()
    model = adapted(base, target_modules=["first"], positions=positions, share_weights=False)
    before, after = watch(base, ["first"])
    kinds = []
    base.first.register_forward_hook(lambda module, args, output: kinds.append(output))
    model(inputs_embeds=torch.randn(2, 7, 8))
    assert_edited(before["first"], after["first"], base.first.reft, units_at(positions, (7, 7), 7))
    expected = WRAPS[wrap](after["first"])
    assert type(kinds[0]) is type(expected)
    if wrap != "tensor":
        assert "extra" in (kinds[0].values() if isinstance(kinds[0], dict) else kinds[0]) or wrap == "model_output"


class Perceptron(nn.Module):
    """`[rows, features]` in and out."""

    def __init__(self):
        super().__init__()
        self.lift, self.norm = nn.Linear(6, 8), nn.LayerNorm(8)
        self.head = nn.Sequential(nn.Linear(8, 5), nn.ReLU())

    def forward(self, rows):
        return self.head(self.norm(self.lift(rows)))


@pytest.mark.parametrize(
    ("target", "expected"),
    [(["lift"], ["lift"]), (["norm"], ["norm"]), (["head"], ["head"]), ("lift|norm", ["lift", "norm"])],
    ids=["linear", "norm", "sequential", "regex"],
)
def test_without_a_token_axis_every_row_is_edited(target, expected):
    base = Perceptron().eval()
    model = adapted(base, target_modules=target)
    sites = sites_of(model)
    assert sites == expected
    before, after = watch(base, sites)
    model(torch.randn(3, 6)).sum().backward()
    for site in sites:
        layer = base.get_submodule(f"{site}.reft")
        assert_edited(before[site], after[site], layer, torch.zeros(3, dtype=torch.long))
        assert all(parameter.grad is not None for parameter in layer.parameters())


def test_without_a_token_axis_the_first_of_several_units_edits():
    model = adapted(Perceptron().eval(), target_modules=["lift"], positions="f1+l1", share_weights=False)
    before, after = watch(model.get_base_model(), ["lift"])
    model(torch.randn(3, 6))
    layer = model.get_base_model().lift.reft
    assert_edited(before["lift"], after["lift"], layer, torch.zeros(3, dtype=torch.long))


def test_blocks_of_a_plain_module_are_asked_for_by_name():
    with pytest.raises(ValueError, match=r"'block_output' needs the blocks of a Transformers model.* target_modules"):
        adapted(Mixer())
    with pytest.raises(ValueError, match=r"layers_to_transform=\[0\] .* Name each module in target_modules instead"):
        adapted(Mixer(), target_modules=["first"], layers_to_transform=[0])


def test_a_width_that_cannot_be_told_is_refused_with_the_remedy():
    base = Mixer()
    del base.first.out_features
    with pytest.raises(ValueError, match=r"'first' \(Block\) is unknown\. Give it an integer attribute out_features"):
        adapted(base, target_modules=["first"])
    base.first.out_features = 4
    with pytest.raises(ValueError, match=r"first returned \(2, 7, 8\), but its adapters were built for 4 features"):
        adapted(base, target_modules=["first"], positions="all")(inputs_embeds=torch.randn(2, 7, 8))


@pytest.mark.parametrize("target", ["q_norm", "rotary_emb"])
def test_an_output_without_the_token_axis_of_the_input_is_refused(target):
    model = adapted(ZOO["qwen3"].build(), target_modules=[target], positions="l1")
    # [batch, tokens, heads, features of a head], and [1, tokens, features of a head]
    with pytest.raises(ValueError, match=rf"{target} returned .* (2 sequences of 7 tokens|adapters were built for)"):
        model(**inputs_of("qwen3"))


# Encoder-decoder models


@pytest.mark.parametrize(
    ("positions", "streams"),
    [
        ("f7+l7", "encoder"),
        ("prompt", "encoder"),
        ("completion", "decoder"),
        ("c2", "decoder"),
        ("all", "encoder decoder"),
        ("l1+c2", "encoder decoder"),
    ],
)
@pytest.mark.parametrize("name", [*ENCODER_DECODER, "bert2bert"])
def test_only_blocks_whose_tokens_are_edited_get_a_layer(name, positions, streams):
    base = tiny.bert2bert() if name == "bert2bert" else ZOO[name].build()
    sites = sites_of(adapted(base, positions=positions))
    encoder, decoder = base.get_encoder(), base.get_decoder()
    in_encoder = [any(base.get_submodule(site) is part for part in encoder.modules()) for site in sites]
    in_decoder = [any(base.get_submodule(site) is part for part in decoder.modules()) for site in sites]
    assert sum(in_encoder) == LAYERS * ("encoder" in streams)
    assert sum(in_decoder) == LAYERS * ("decoder" in streams)
    assert len(sites) == LAYERS * len(streams.split())


def test_named_modules_whose_tokens_are_not_edited_get_no_layer():
    model = adapted(ZOO["t5"].build(), target_modules=["SelfAttention"], positions="f2+l1")
    assert sites_of(model) == [f"encoder.block.{i}.layer.0.SelfAttention" for i in range(LAYERS)]
    for settings in ({"target_modules": ["EncDecAttention"]}, {"layers_pattern": "decoder.block"}):
        with pytest.raises(ValueError, match=r"positions='f2\+l1' selects no token in 'decoder\.block\.0.* completion"):
            adapted(ZOO["t5"].build(), positions="f2+l1", **settings)


def test_stacks_of_different_depth_count_their_own_layers():
    deeper = lambda: ZOO["t5"]._replace(settings=ZOO["t5"].settings | {"num_decoder_layers": 5}).build()  # noqa: E731
    last = adapted(deeper(), positions="all", layers_to_transform=[-1])
    assert sites_of(last) == ["encoder.block.2", "decoder.block.4"]
    assert sites_of(adapted(deeper(), positions="all", layers_to_transform=[3])) == ["decoder.block.3"]
    with pytest.raises(ValueError, match=r"no layer 5.* 3 layers in 'encoder\.block' and 5 layers in 'decoder\.block'"):
        adapted(deeper(), positions="all", layers_to_transform=5)


def test_a_model_composed_of_an_encoder_and_a_decoder_is_edited_in_both():
    base = tiny.bert2bert()
    inputs = inputs_of("t5")
    model = adapted(base, positions="all", layers_to_transform=1)
    encoder, decoder = "encoder.encoder.layer.1", "decoder.bert.encoder.layer.1"
    before, after = watch(base, [encoder, decoder])
    model(**inputs)
    for name, units in ((encoder, units_at("all", LENGTHS, 7)), (decoder, units_at("all", (4, 4), 4))):
        assert_edited(before[name], after[name], base.get_submodule(f"{name}.reft"), units)


def test_a_decoder_that_listens_is_edited():
    base = tiny.WHISPER.build()
    model = adapted(base, positions="all", layers_to_transform=1)
    encoder, decoder = f"{tiny.WHISPER.encoder}.1", f"{tiny.WHISPER.blocks}.1"
    before, after = watch(base, [encoder, decoder])
    model(input_features=torch.randn(2, 8, 32), decoder_input_ids=torch.randint(10, VOCAB, (2, 4)))
    for name, tokens in ((encoder, 16), (decoder, 4)):
        units = units_at("all", (tokens, tokens), tokens)
        assert_edited(before[name], after[name], base.get_submodule(f"{name}.reft"), units)


# Models whose layers are not blocks of a list


def test_a_block_that_is_applied_several_times_is_edited_each_time():
    base = tiny.ALBERT.build()
    model = adapted(base, positions="all")
    block = f"{tiny.ALBERT.blocks}.0"
    assert sites_of(model) == [block]
    calls = []
    base.get_submodule(block).register_forward_hook(lambda module, args, output: calls.append(args[0]), prepend=True)
    before, after = watch(base, [block])
    model(**inputs_of("bert"))
    assert len(calls) == LAYERS
    assert_edited(before[block], after[block], base.get_submodule(f"{block}.reft"), units_at("all", LENGTHS, 7))
    with pytest.raises(ValueError, match=r"there is no layer 1\. The model has 1 layers in"):
        adapted(tiny.ALBERT.build(), layers_to_transform=1)


def test_two_stacks_of_equal_weight_are_both_edited():
    class Twins(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.low, self.high = (tiny.llama().model.layers for _ in range(2))

    base = Twins(tiny.llama(attn_implementation="eager").config)
    assert sites_of(adapted(base)) == [f"{stack}.{i}" for stack in ("low", "high") for i in range(LAYERS)]
    assert sites_of(adapted(Twins(base.config), layers_pattern="high", layers_to_transform=0)) == ["high.0"]


class Pooled(PreTrainedModel):
    """Has an embedding and a projection, and nothing that is a stack of blocks."""

    config_class = tiny.LlamaConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed, self.head = nn.Embedding(8, 8), nn.Linear(8, 8)


def test_a_model_without_a_list_of_blocks_asks_for_names_and_says_what_it_looked_for():
    base = Pooled(tiny.llama(attn_implementation="eager").config)
    looked = "no nn.ModuleList in it has modules whose outputs are recorded as hidden states"
    with pytest.raises(ValueError, match=f"none were found in Pooled: {looked}.* Name the modules to edit in target_m"):
        adapted(base)
    with pytest.raises(ValueError, match=f"none were found in Pooled: {looked}.* Name each module in target_modules"):
        adapted(base, target_modules=["head"], layers_to_transform=[0])


def test_two_towers_of_which_none_is_the_model_are_chosen_from_by_the_caller():
    class Towers(PreTrainedModel):
        def __init__(self, config):
            super().__init__(config)
            self.low, self.high = (ZOO["bert"].build() for _ in range(2))

    config = tiny.llama(attn_implementation="eager").config
    with pytest.raises(
        ValueError, match=r"nothing tells .*: 'low\.encoder\.layer', 'high\.encoder\.layer'\. Choose with"
    ):
        adapted(Towers(config))
    sites = sites_of(adapted(Towers(config), layers_pattern="high.encoder.layer"))
    assert sites == [f"high.encoder.layer.{i}" for i in range(LAYERS)]


def test_a_head_that_generation_calls_for_the_last_token_alone_is_edited():
    settings = {"target_modules": ["lm_head"], "positions": "all", "r": 3, "init_weights": False}
    model = get_peft_model(tiny.llama(tie_word_embeddings=False), ReftConfig(**settings)).eval()
    model.add_adapter("other", ReftConfig(**settings))
    ids = torch.arange(3, 17).reshape(2, 7)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    tokens = model.generate(input_ids=ids, **options)
    for step in range(7, 11):
        expected = model(input_ids=tokens[:, :step]).logits[:, -1].argmax(-1)
        assert torch.equal(tokens[:, step], expected)
    mixed = model.generate(input_ids=ids, adapter_names=["default", "other"], **options)
    model.set_adapter("other")
    assert torch.equal(mixed, torch.stack([tokens[0], model.generate(input_ids=ids, **options)[1]]))


class Attending(torch.nn.Module):
    """A model of no kind that Transformers knows, whose attention may want tokens first."""

    def __init__(self, batch_first: bool):
        super().__init__()
        self.embedding = torch.nn.Embedding(64, 8)
        self.norm = torch.nn.LayerNorm(8)
        self.attention = torch.nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, input_ids):
        hidden = self.norm(self.embedding(input_ids))
        if self.attention.batch_first:
            return self.attention(hidden, hidden, hidden)[0]
        hidden = hidden.transpose(0, 1)
        return self.attention(hidden, hidden, hidden)[0].transpose(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("batch", [2, 5])
def test_the_first_token_behind_an_attention_of_pytorch(batch, batch_first):
    ids, base = torch.arange(5 * batch).reshape(batch, 5), Attending(batch_first).eval()
    before = base(ids)
    config = ReftConfig(r=2, positions="f1", target_modules=["attention"], init_weights=False)
    # The attention itself rounds differently once its output goes to a hook.
    changed = ((get_peft_model(base, config)(ids) - before).abs() > 1e-5).any(-1)
    assert changed[:, 0].all()
    assert not changed[:, 1:].any()


@pytest.mark.parametrize("module", ["embedding", "norm", "attention"])
def test_a_second_adapter_finds_the_width_of_a_module_that_has_one(module):
    config = ReftConfig(r=2, positions="all", target_modules=[module])
    model = get_peft_model(Attending(True), config)
    model.add_adapter("second", config)
    assert [layer.out_features for layer in layers_of(model)] == [8]


@torch.no_grad()
@pytest.mark.parametrize("component", [["block_output", "block_input"], ["block_input", "block_output"]], ids=str)
def test_nothing_stays_on_blocks_that_are_called_past_their_hooks(component):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "embedding_size": 32}
    config = transformers.SqueezeBertConfig(**sizes, num_hidden_layers=2, num_attention_heads=4)
    base, ids = tiny.build(transformers.SqueezeBertModel, config), torch.arange(3, 11)[None]
    before = base(ids)[0]
    model = get_peft_model(base, ReftConfig(r=2, positions="all", component=component, init_weights=False)).eval()
    assert not torch.equal(model(ids)[0], before)
    assert torch.equal(model.unload()(ids)[0], before)
    assert not any("forward" in vars(module) for module in base.modules())
