"""CLIP score and PickScore of a tiny random CLIP, against its equations in numpy; no weights are needed."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from swd.metrics.base import Drawn
from swd.metrics.text_image import TOKENS, ClipFeatures, ClipScore, PickScore
from swd.types import UserError

WIDTH, HEADS, LAYERS, EMBEDDING, SIDE, PATCH = 16, 2, 2, 6, 64, 32
LETTERS = "abcdefghijklmnopqrstuvwxyz"
PROMPTS = ["a cab", "f", "a" + " b" * 100]
Arrays = Mapping[str, np.ndarray]


def build_tokenizer() -> CLIPTokenizer:
    tokens = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "ab</w>", "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=[("a", "b</w>")])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP of another random network for pictures and for prompts, with its tokenizer."""
    path = tmp_path_factory.mktemp("clip") / "tiny-clip"
    tower = {
        "hidden_size": WIDTH,
        "intermediate_size": 3 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "projection_dim": EMBEDDING,
    }
    vocab = build_tokenizer().get_vocab()
    ends = {"bos_token_id": vocab["<|startoftext|>"], "eos_token_id": vocab["<|endoftext|>"]}
    text = tower | ends | {"vocab_size": len(vocab), "max_position_embeddings": TOKENS}
    vision = tower | {"image_size": SIDE, "patch_size": PATCH}
    torch.manual_seed(0)
    network = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=EMBEDDING))
    for weight in network.parameters():
        torch.nn.init.normal_(weight, std=0.2)  # CLIP's own initial weights make all embeddings alike
    network.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture
def features(folder: Path) -> ClipFeatures:
    return ClipFeatures(str(folder), side=SIDE)


def pictures(*sizes: tuple[int, int]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes]


# The network in numpy, as arXiv 2103.00020 describes it


def normed(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x: np.ndarray, w: Arrays, name: str) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(x: np.ndarray, w: Arrays, name: str, mask: np.ndarray) -> np.ndarray:
    q, k, v = (linear(x, w, f"{name}.{part}_proj").reshape(len(x), HEADS, -1) for part in "qkv")
    logits = np.einsum("ihd,jhd->hij", q, k) / math.sqrt(WIDTH // HEADS) + mask
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    mixed = np.einsum("hij,jhd->ihd", weights / weights.sum(-1, keepdims=True), v)
    return linear(mixed.reshape(len(x), WIDTH), w, f"{name}.out_proj")


def transformer(x: np.ndarray, w: Arrays, tower: str, causal: bool) -> np.ndarray:
    mask = np.triu(np.full((len(x), len(x)), -np.inf), 1) if causal else np.zeros((len(x), len(x)))
    for i in range(LAYERS):
        layer = f"{tower}.encoder.layers.{i}"
        x = x + attention(normed(x, w, f"{layer}.layer_norm1"), w, f"{layer}.self_attn", mask)
        hidden = linear(normed(x, w, f"{layer}.layer_norm2"), w, f"{layer}.mlp.fc1")
        x = x + linear(hidden / (1 + np.exp(-1.702 * hidden)), w, f"{layer}.mlp.fc2")
    return x


def embed_text(ids: list[int], w: Arrays) -> np.ndarray:
    x = w["text_model.embeddings.token_embedding.weight"][ids]
    x = transformer(x + w["text_model.embeddings.position_embedding.weight"][: len(ids)], w, "text_model", True)
    pooled = normed(x, w, "text_model.final_layer_norm")[-1] @ w["text_projection.weight"].T
    return pooled / np.linalg.norm(pooled)


def embed_picture(pixels: np.ndarray, w: Arrays) -> np.ndarray:
    n = SIDE // PATCH
    patches = pixels.reshape(3, n, PATCH, n, PATCH).transpose(1, 3, 0, 2, 4).reshape(n * n, -1)
    x = patches @ w["vision_model.embeddings.patch_embedding.weight"].reshape(WIDTH, -1).T
    x = np.concatenate([w["vision_model.embeddings.class_embedding"][None], x])
    x = normed(x + w["vision_model.embeddings.position_embedding.weight"], w, "vision_model.pre_layrnorm")
    first = transformer(x, w, "vision_model", False)[0]
    pooled = normed(first, w, "vision_model.post_layernorm") @ w["visual_projection.weight"].T
    return pooled / np.linalg.norm(pooled)


def weights(features: ClipFeatures) -> Arrays:
    return {name: value.double().numpy() for name, value in features.load().state_dict().items()}


def ids_of(prompt: str) -> list[int]:
    """One token a word of one letter; "cab" is c and ab, of which the one merge makes a token."""
    vocab = build_tokenizer().get_vocab()
    words = prompt.split()
    tokens = [token for word in words for token in (("c", "ab</w>") if word == "cab" else (f"{word}</w>",))]
    known = [vocab[token] for token in tokens]
    return [vocab["<|startoftext|>"], *known[: TOKENS - 2], vocab["<|endoftext|>"]]


def test_embeddings_are_those_of_the_equations(features: ClipFeatures) -> None:
    drawn = pictures((SIDE, SIDE), (90, 100), (200, 70))
    found, prompts = features(drawn), features.prompt_features(PROMPTS)
    w = weights(features)
    expected = [embed_picture(features.prepare(picture).double().numpy(), w) for picture in drawn]
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(prompts, [embed_text(ids_of(prompt), w) for prompt in PROMPTS], atol=1e-5)
    assert min((each[0] - each[1]).abs().max().item() for each in (found, prompts)) > 0.01


def test_the_preparation_is_that_of_clips_own_processor(features: ClipFeatures) -> None:
    processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE})
    for picture in pictures((SIDE, SIDE), (90, 100), (201, 70), (40, 33)):
        expected = processor(Image.fromarray(picture.permute(1, 2, 0).numpy()), return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(features.prepare(picture), expected, atol=1e-5, rtol=0)
    assert features.name == "tiny-clip-64bicubic-crop64-77tokens"


def test_a_prompt_alone_and_in_a_batch_is_the_same(features: ClipFeatures) -> None:
    together = features.prompt_features(PROMPTS)
    alone = torch.cat([features.prompt_features([prompt]) for prompt in PROMPTS])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    # Words beyond the limit are not seen; words within are.
    longer = features.prompt_features([PROMPTS[2] + " c", "a" + " b" * 73 + " c" + " b" * 20])
    torch.testing.assert_close(longer[0], together[2], atol=1e-6, rtol=0)
    assert (longer[1] - together[2]).abs().max() > 1e-4


@pytest.mark.parametrize("metric, name, least", [(ClipScore, "clip", 0.0), (PickScore, "pickscore", -100.0)])
def test_scores_are_cosines_times_100(features: ClipFeatures, metric: type[ClipScore], name: str, least: float) -> None:
    drawn = pictures(*[(SIDE, SIDE)] * 3)
    found = metric(features).score(
        Drawn({features.name: features(drawn)}, PROMPTS, {features.name: features.prompt_features(PROMPTS)})
    )
    w = weights(features)
    cosines = [
        embed_picture(features.prepare(picture).double().numpy(), w) @ embed_text(ids_of(prompt), w)
        for picture, prompt in zip(drawn, PROMPTS, strict=True)
    ]
    assert min(cosines) < 0 < max(cosines)
    expected = [max(least, 100 * cosine) for cosine in cosines]
    assert found.parts is not None and found.parts.tolist() == pytest.approx(expected, abs=1e-3)
    assert found.values == {name: pytest.approx(np.mean(expected), abs=1e-3)}
    assert metric.higher_is_better and metric.needs_prompts


def test_absent_files_are_one_line(folder: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare, ignore=shutil.ignore_patterns("tokenizer*", "vocab*", "merges*"))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(folder, unfinished, ignore=shutil.ignore_patterns("*.safetensors"))
    for extractor, message in (
        (ClipFeatures("/nowhere"), "path=/nowhere has no config.json"),
        (ClipFeatures(str(unfinished)), "has no .safetensors weights"),
        (ClipFeatures(str(bare)), f"tokenizer={bare} has no tokenizer.json or vocab.json"),
        (ClipFeatures(str(folder), tokenizer="/nowhere"), "tokenizer=/nowhere has no tokenizer.json or vocab.json"),
    ):
        with pytest.raises(UserError) as raised:
            ClipScore(extractor).check()
        assert message in str(raised.value) and "\n" not in str(raised.value)
    ClipScore(ClipFeatures(str(bare), tokenizer=str(folder))).check()


def test_another_number_of_prompts_is_refused(features: ClipFeatures) -> None:
    rows = torch.eye(EMBEDDING)
    with pytest.raises(UserError, match="clip: 3 pictures but 2 prompts"):
        ClipScore(features).score(Drawn({features.name: rows[:3]}, [], {features.name: rows[:2]}))
