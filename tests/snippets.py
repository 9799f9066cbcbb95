"""Reads the code blocks of Markdown pages, and the workspace that the manual's snippets run in.

A page's Python blocks run from top to bottom in one namespace, in a folder in which every hub id that the pages name is
a tiny random model. What a fragment leaves out stands before it in a comment that readers do not see:

    <!-- setup
    inputs = tokenizer("How can I stay fit?", return_tensors="pt")
    -->
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import tiny
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from peft_reft.tokens.positions import parse

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LANGUAGE_MODELS = ("HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")
ENCODERS = ("sentence-transformers/all-MiniLM-L6-v2",)

_BLOCK = re.compile(
    r"^(?P<indent> *)```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^ *```$|^<!-- setup\n(?P<setup>.*?)^-->$",
    re.DOTALL | re.MULTILINE,
)
_SPECIAL = ["<pad>", "<s>", "</s>", "<user>", "<assistant>"]
_CHAT = (
    "{% for message in messages %}<{{ message['role'] }}>"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


class Block(NamedTuple):
    """A code block: the number of its first line, its language (`setup` for hidden ones), its code."""

    line: int
    language: str
    code: str


def blocks(page: Path) -> list[Block]:
    """All code blocks of a page, and the setup in its comments, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 2
        if match["setup"] is not None:
            found.append(Block(line, "setup", match["setup"]))
        else:
            code = re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE)
            found.append(Block(line, match["language"], code))
    return found


def run(page: Path) -> None:
    """Run a page's Python blocks from top to bottom; a traceback names the page and its line."""
    namespace = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language in ("python", "setup"):
            code = compile("\n" * (block.line - 1) + block.code, str(page), "exec")
            exec(code, namespace)


def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, and a chat template."""
    alphabet = {letter: number for number, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(_SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens=["<user>", "<assistant>"],
        chat_template=_CHAT,
    )


def create_workspace(folder: Path) -> None:
    """Save tiny models with tokenizers under every hub id that the pages name, which `from_pretrained` finds there."""
    words = tokenizer()
    sizes = {
        "vocab_size": len(words),
        "pad_token_id": words.pad_token_id,
        "bos_token_id": words.bos_token_id,
        "eos_token_id": words.eos_token_id,
        "max_position_embeddings": 1024,
    }
    # Heads of 32: vLLM has no kernel for smaller ones.
    heads = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    language_model = tiny.llama(**sizes | heads, num_hidden_layers=24)
    encoder = tiny.build(
        BertForSequenceClassification,
        BertConfig(**sizes, hidden_size=tiny.HIDDEN, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4),
    )
    for names, model in ((LANGUAGE_MODELS, language_model), (ENCODERS, encoder)):
        for name in names:
            model.save_pretrained(folder / name)
            words.save_pretrained(folder / name)


def words_of_the_table(text: str) -> list[str]:
    """The words in a page's table of positions, with numbers in place of n and m.

    Raises:
        ValueError: one of them is no word.
    """
    table = re.search(r"^\| word \| tokens \|\n.*?\n\n", text, re.DOTALL | re.MULTILINE)[0]
    cells = re.findall(r"^\| (`[^|]*`) \|", table, re.MULTILINE)
    words = [word.replace("<n>", "3").replace("<m>", "2") for cell in cells for word in re.findall(r"`([^`]*)`", cell)]
    for word in words:
        parse(word)
    return words
