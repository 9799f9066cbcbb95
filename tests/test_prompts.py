"""What a pass says about its prompt: errors, warnings, and the tokens shown to the user."""

from __future__ import annotations

import gc
import io
import warnings
from contextlib import redirect_stdout

import pytest
import torch
from peft import LoraConfig, get_peft_model
from routes import ROLES, make_pair, pad, sequences
from tiny import llama
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import DynamicCache, PreTrainedTokenizerFast
from transformers.generation.continuous_batching import PagedAttentionCache

from peft_reft import ReftConfig, show_positions
from peft_reft.tokens.passes import Pass

PROMPT_BOUNDED = ["f2+l3", "l1", "prompt", "completion", "c2", "f3+c2"]


@pytest.fixture
def batch():
    return pad(ROLES, sequences())


@pytest.mark.parametrize("spec", PROMPT_BOUNDED)
def test_labels_without_a_prompt_are_refused_with_the_remedies(spec, batch):
    model = make_pair(spec).peft
    with pytest.raises(ValueError, match="there is no prompt") as error:
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.ids.masked_fill(batch.mask == 0, -100))
    for remedy in ("prompt/completion data", "assistant_only_loss", "positions='all'", "prompt_mask"):
        assert remedy in str(error.value)


@pytest.mark.parametrize("left", [0, "all"])
def test_the_rows_without_a_prompt_are_named(left):
    batch = pad(ROLES, sequences(), left=left)
    labels = batch.labels.clone()
    for row in (1, 3):
        labels[row] = batch.ids[row].masked_fill(batch.mask[row] == 0, -100)
    model = make_pair("f2+l3").peft
    with pytest.raises(ValueError, match="the labels of rows 1, 3 of this batch of 4 supervise the very first token"):
        model(input_ids=batch.ids, attention_mask=batch.mask, labels=labels)


def test_a_packed_document_without_a_prompt_is_refused():
    ids = torch.arange(3, 11)[None]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    labels = ids.masked_fill(torch.tensor([[1, 1, 0, 0, 0, 0, 0, 0]]).bool(), -100)
    with pytest.raises(ValueError, match="the labels of row 0 of this batch of 1"):
        make_pair("l1").peft(input_ids=ids, position_ids=positions, labels=labels, use_cache=False)


def test_all_needs_no_prompt(batch):
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    make_pair("all").peft(input_ids=batch.ids, attention_mask=batch.mask, labels=labels).loss.backward()


def test_the_model_still_works_after_a_refused_pass(batch):
    model = make_pair("l1").peft
    before = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    with pytest.raises(ValueError, match="there is no prompt"):
        model(input_ids=batch.ids, labels=batch.ids)
    after = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(4, 5, dtype=torch.bool), r"prompt_mask must have the shape \(4, 12\) of this pass, got \(4, 5\)"),
        (torch.ones(12, dtype=torch.bool), r"prompt_mask must have the shape \(4, 12\) of this pass, got \(12,\)"),
        (torch.ones(4, 12), "prompt_mask must be boolean .* got dtype torch.float32"),
        ([[True]], "prompt_mask must be a tensor, got list"),
    ],
    ids=["tokens", "axes", "dtype", "type"],
)
def test_a_prompt_mask_of_wrong_shape_or_dtype_is_refused(mask, message, batch):
    with pytest.raises(ValueError, match=message):
        make_pair("f2+l3").peft(input_ids=batch.ids, attention_mask=batch.mask, prompt_mask=mask)


def test_a_prompt_mask_on_padding_is_refused_with_both_shapes(batch):
    prompt = batch.prompt.clone()
    prompt[0, -1] = True
    message = r"prompt_mask and attention_mask, both \(4, 12\) here, contradict each other: row 0"
    with pytest.raises(ValueError, match=message):
        make_pair("f2+l3").peft(input_ids=batch.ids, attention_mask=batch.mask, prompt_mask=prompt)


def test_prompt_mask_goes_before_labels(batch):
    model = make_pair("prompt").peft
    told = model(input_ids=batch.ids, attention_mask=batch.mask, prompt_mask=batch.prompt).logits
    contradicted = model(
        input_ids=batch.ids, attention_mask=batch.mask, prompt_mask=batch.prompt, labels=batch.ids
    ).logits
    assert torch.equal(told, contradicted)


def test_training_a_language_model_without_labels_warns():
    model = make_pair("l1").peft.train()
    with pytest.warns(UserWarning, match="the whole sequence counts as prompt"):
        model(input_ids=torch.arange(3, 11)[None])


@pytest.mark.parametrize("mode", ["training", "evaluation", "no gradients"])
@pytest.mark.parametrize("why", ["labels", "prompt_mask", "all"])
def test_no_warning_where_the_prompt_is_known(why, mode):
    model = make_pair("all" if why == "all" else "l1").peft.train(mode != "evaluation")
    ids = torch.arange(3, 11)[None]
    told = {}
    if why == "labels":
        told = {"labels": ids.masked_fill(torch.arange(8) < 4, -100)}
    elif why == "prompt_mask":
        told = {"prompt_mask": torch.arange(8)[None] < 4}
    with warnings.catch_warnings(), torch.set_grad_enabled(mode != "no gradients"):
        warnings.simplefilter("error", UserWarning)
        model(input_ids=ids, **told)


@pytest.mark.parametrize("spec", ["l1", "f2+l2", "prompt", "c2", "completion", "f1+c1"])
def test_scoring_without_a_prompt_warns_once_a_model_and_names_the_remedies(spec):
    model = make_pair(spec).peft.eval()
    ids = torch.arange(3, 11)[None]
    with pytest.warns(UserWarning, match="the whole sequence counts as prompt") as caught:
        first, again = (model(input_ids=ids).logits for _ in range(2))
    told = [str(warning.message) for warning in caught if "counts as prompt" in str(warning.message)]
    assert len(told) == 1
    for remedy in ("labels", "prompt_mask", "prompt_mask_of"):
        assert remedy in told[0]
    assert torch.equal(first, again)
    assert torch.equal(first, model(input_ids=ids, prompt_mask=torch.ones_like(ids)).logits)


@pytest.mark.parametrize("spec", ["f2", "all"])
def test_scoring_does_not_warn_where_the_end_of_the_prompt_does_not_matter(spec):
    model = make_pair(spec).peft.eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(input_ids=torch.arange(3, 11)[None])


def test_a_training_batch_in_which_nothing_is_edited_warns():
    """Prompts of one token are halved to none."""
    ids = torch.arange(3, 11).reshape(2, 4)
    model = make_pair("f7+l7").peft.train()
    with pytest.warns(UserWarning, match="edits no token of this training batch"):
        model(input_ids=ids, labels=ids.masked_fill(torch.arange(4) < 1, -100))


@pytest.mark.parametrize("spec", ["f7", "l1", "prompt", "f7+l7", "completion"])
@pytest.mark.parametrize("in_graph", [False, True])
def test_plain_text_that_was_packed_is_refused_as_it_is_unpacked(in_graph, spec):
    """TRL's padding-free collator removes the label of each first token."""
    ids = torch.arange(3, 11)[None]
    labels = ids.clone()
    labels[0, [0, 4]] = -100
    model = make_pair(spec).peft
    call = torch.compile(model, backend="eager") if in_graph else model
    for training in (True, False):
        model.train(training)
        with pytest.raises(ValueError, match="padding-free collators do with plain text"):
            call(input_ids=ids, position_ids=torch.arange(8)[None] % 4, labels=labels, use_cache=False)
    # Among other prompts one of a single token is one.
    labels[0, 5] = -100
    call(input_ids=ids, position_ids=torch.arange(8)[None] % 4, labels=labels, use_cache=False)


def test_a_forward_after_an_exception_plans_anew(batch):
    model = make_pair("l1").peft
    expected = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 3), 10_000))
    assert torch.equal(model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels).logits, expected)


def test_the_part_of_the_model_that_owns_the_blocks_can_be_called_alone():
    """Liger's losses and encoders in `generate` bypass the model itself."""
    pair = make_pair("f2+l1")
    ids = sequences(("ppppp",))
    inner = pair.peft.base_model.model.model
    with torch.no_grad():
        hidden = inner(input_ids=torch.tensor(ids)).last_hidden_state
        logits = pair.peft.base_model.model.lm_head(hidden)[0]
    torch.testing.assert_close(logits, pair.reference.logits(ids[0], "ppppp"), rtol=1e-5, atol=1e-5)


def test_an_interrupted_pass_through_a_part_leaves_nothing_behind(batch):
    model = make_pair("l1").peft
    call = {"input_ids": batch.ids, "attention_mask": batch.mask, "labels": batch.labels}
    expected = model(**call).logits
    block = model.base_model.model.model.layers[1]

    def interrupt(*args):
        raise KeyboardInterrupt

    hook = block.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model.base_model.model.model(input_ids=batch.ids)
    hook.remove()
    assert torch.equal(model(**call).logits, expected)


def test_a_decoding_loop_that_does_not_tell_the_prompt_is_warned():
    model = make_pair("l1").peft
    cache = DynamicCache(config=model.base_model.model.config)
    model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=cache)
    with pytest.warns(UserWarning, match="needs to know whether the tokens that continue this cache are prompt"):
        model(input_ids=torch.tensor([[6]]), past_key_values=cache)


def test_parameters_get_zero_gradients_where_nothing_is_edited():
    model = make_pair("c2").peft.train()
    ids = torch.arange(3, 11)[None]
    with pytest.warns(UserWarning, match="edits no token"):
        logits = model(input_ids=ids, labels=torch.full_like(ids, -100)).logits
    logits.sum().backward()
    grads = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert grads
    assert not any(grad.any() for grad in grads)


def test_a_generate_call_that_loses_rows_is_refused():
    model = make_pair("l1").peft

    def drop_a_row(model, input_ids, **kwargs):
        return model(input_ids=input_ids[:1], use_cache=False).logits.argmax(-1)

    with pytest.raises(ValueError, match="generate was called with 2 sequences, but one of its passes has 1"):
        model.generate(input_ids=torch.tensor([[3, 4], [5, 6]]), custom_generate=drop_a_row)


def test_classifier_free_guidance_is_refused():
    with pytest.raises(NotImplementedError, match=r"guidance_scale=1\.5"):
        make_pair("l1").peft.generate(input_ids=torch.tensor([[3, 4]]), guidance_scale=1.5)


def test_data_parallel_is_refused():
    model = make_pair("l1").peft.base_model.model
    model._is_replica = True  # as torch marks the copies
    with pytest.raises(NotImplementedError, match=r"nn\.DataParallel"):
        model(input_ids=torch.tensor([[3, 4]]))


@pytest.mark.parametrize("gradients", [False, True])
def test_a_pass_is_kept_no_longer_than_its_graph(gradients, batch):
    model = make_pair("l1").peft
    with torch.set_grad_enabled(gradients):
        output = model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.labels)
    del output
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Pass)]


def test_continuous_batching_is_refused():
    model = make_pair("l1").peft.base_model.model
    cache = PagedAttentionCache.__new__(PagedAttentionCache)
    with pytest.raises(NotImplementedError, match="Continuous batching"):
        model(input_ids=torch.tensor([[3, 4]]), cache=cache)


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"<{i}>": i for i in range(8)} | {"hello": 8, "world": 9, "how": 10, "are": 11, "you": 12, "|": 13}
    backend = Tokenizer(models.WordLevel(words, unk_token="<3>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<2>")
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ 4 if m.role == 'user' else 5 }}> {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}<5> {% endif %}"
    )
    return tokenizer


def shown(*args) -> str:
    out = io.StringIO()
    with redirect_stdout(out):
        show_positions(*args)
    return out.getvalue()


def test_show_positions_marks_the_edited_tokens_of_a_text(tokenizer):
    text = shown(make_pair("f1+l2").peft, tokenizer, "hello world how are you")
    assert "[hello]worldhow[are][you]" in text.replace(" ", "")
    assert "positions f1+l2, at 2 layer(s)" in text
    assert "unit 1 (f1+l2): 3 of 5 tokens (0, 3-4)" in text


def test_show_positions_tells_units_apart(tokenizer):
    text = shown(make_pair("f1+l2", shared=False).peft, tokenizer, "hello world how are you")
    assert "[hello]worldhow[are]2[you]2" in text.replace(" ", "")
    assert "unit 2 (l2): 2 of 5 tokens (3-4)" in text


def test_show_positions_takes_messages_as_generate_does(tokenizer):
    text = shown(make_pair("l2").peft, tokenizer, [{"role": "user", "content": "hello world"}])
    assert "<4>hello[world][<5>]" in text.replace(" ", "")


def test_show_positions_takes_an_answer_as_completion(tokenizer):
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "how are"}]
    text = shown(make_pair("l1+c1").peft, tokenizer, messages)
    assert "<4>hello[<5>][how]are" in text.replace(" ", "")


def test_show_positions_agrees_with_the_pass_itself(tokenizer):
    """The marked tokens are those whose hidden representation changes after the first edited layer."""
    pair = make_pair("f2+l1", sites=("model.layers.0",))
    text = "hello world how are you"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    edited = pair.peft(input_ids=ids, output_hidden_states=True).hidden_states[1]
    with pair.peft.disable_adapter():
        base = pair.peft(input_ids=ids, output_hidden_states=True).hidden_states[1]
    changed = (edited != base).any(-1)[0].nonzero().flatten().tolist()
    assert changed == [0, 1, 4]
    assert "(0-1, 4)" in shown(pair.peft, tokenizer, text)


def test_show_positions_in_color_and_in_html(tokenizer):
    from peft_reft.analysis.show import _edits, _to_html, _to_text

    edits = _edits(make_pair("l1").peft, [8, 9], 2)
    assert "hello\033[30;42mworld\033[0m" in _to_text(["hello", "world"], edits, colored=True)
    assert '<span style="background:#a6e3a1;color:black">&lt;b&gt;</span>' in _to_html(["hello", "<b>"], edits)


def test_show_positions_without_an_adapter_says_so(tokenizer):
    model = make_pair("l1").peft
    with model.disable_adapter(), pytest.raises(ValueError, match="no active ReFT adapter"):
        show_positions(model, tokenizer, "hello")
    lora = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="no active ReFT adapter"):
        show_positions(lora, tokenizer, "hello")


def test_several_adapters_are_shown_one_after_the_other(tokenizer):
    model = make_pair("l1").peft
    model.add_adapter("other", ReftConfig(r=2, positions="f1", layers_to_transform=[1]))
    model.base_model.set_adapter(["default", "other"])
    text = shown(model, tokenizer, "hello world").replace(" ", "")
    assert "hello[world]" in text
    assert "[hello]world" in text


class Flattening(torch.nn.Module):
    """Puts all tokens on one axis for its inner layer, as OPT does."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, inputs_embeds, attention_mask=None):
        return self.inner(inputs_embeds.flatten(0, 1)).view_as(inputs_embeds)


def test_tokens_put_on_one_axis_are_still_told_apart():
    config = ReftConfig(r=2, positions="f1", target_modules=["inner"], init_weights=False)
    model = get_peft_model(Flattening(), config)
    hidden = torch.randn(2, 5, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    edited = model(inputs_embeds=hidden, attention_mask=mask)
    with model.disable_adapter():
        changed = (edited != model(inputs_embeds=hidden, attention_mask=mask)).any(-1)
    assert changed.nonzero().tolist() == [[0, 2], [1, 0]]


def test_a_pass_without_known_inputs_is_one_prompt():
    class Pixels(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(8, 8)

        def forward(self, pixel_values):
            return self.inner(pixel_values)

    config = ReftConfig(r=2, positions="f1+l2", share_weights=False, target_modules=["inner"], init_weights=False)
    model = get_peft_model(Pixels(), config)
    for tokens in (5, 3):
        pixels = torch.randn(2, tokens, 8)
        edited = model(pixels)
        with model.disable_adapter():
            changed = (edited != model(pixels)).any(-1)
        assert changed[0].nonzero().flatten().tolist() == [0, tokens - 2, tokens - 1]
