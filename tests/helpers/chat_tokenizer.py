"""A tiny tokenizer of Qwen's class, for families whose prompts stand in a chat template."""

from __future__ import annotations

import json

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from swd.shapes.dataset import WORDS

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>{% if enable_thinking is false %}<think></think>{% endif %}{% endif %}"
)
"""As the published one, with one token for each part: three around a prompt, five without thinking."""
SPECIAL = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]


def build_chat_tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE: every word of the shapes' captions is one token, and any other text can be tokenized too."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, min_frequency=1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([word for each in WORDS for word in (each, f" {each}")], trainer)
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=merges, additional_special_tokens=SPECIAL)
    tokenizer.chat_template = TEMPLATE
    return tokenizer
