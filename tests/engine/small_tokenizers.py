"""Small tokenizers with the rules of Llama 2, Llama 3, Qwen 3 and Gemma 3, trained on a few lines of many scripts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from megatron_llm.tokenizer.build import build

LINES = [
    "Rødgrød med fløde, æblekage og en kop kaffe kostede 3,14 kr. i 1999; det var dengang!",
    "It's what they've said: we'll see, I'd guess, you're right.",
    "Привет, мир! Как дела сегодня?",
    "Καλημέρα κόσμε, τι κάνεις;",
    "नमस्ते दुनिया, कैसे हो?",
    "สวัสดีชาวโลก สบายดีไหม",
    "مرحبا بالعالم، كيف حالك؟",
    "日本語のテキストを書きます。漢字とかな。",
    "한국어 문장도 하나 있습니다.",
    "if (x == 1) {\n\treturn [1, 2, 3];\r\n}  // done 😀👍",
    "e\u0301te\u0301 na\u00efve cafe\u0301 ﬁn ½ ①",
] * 3
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_2(folder: Path) -> Any:
    """SentencePiece BPE with byte fallback."""
    path = folder / "tokenizer.model"
    with path.open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(LINES), model_writer=file, minloglevel=2, vocab_size=560, model_type="bpe",
            byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False,
        )  # fmt: skip
    return build("SentencePieceTokenizer", path, no_new_tokens=True)


def llama_3(folder: Path) -> Any:
    """Bytes, split by a regular expression that takes three digits at a time; whole words skip the merges."""
    return byte_level(folder, SPLIT % "{1,3}", None, "<|end_of_text|>", ignore_merges=True)


def qwen_3(folder: Path) -> Any:
    """Bytes of composed text (NFC), split by a regular expression that takes digits one by one."""
    return byte_level(folder, SPLIT % "", normalizers.NFC(), "<|endoftext|>")


def byte_level(folder: Path, split: str, normaliser: Any, end: str, **options: Any) -> Any:
    """A byte-level tokenizer.json."""
    backend = Tokenizer(models.BPE(**options))
    if normaliser:
        backend.normalizer = normaliser
    steps = [pre_tokenizers.Split(Regex(split), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.add_special_tokens([end, "<|start|>"])
    return saved(folder, json.loads(backend.to_str()), end)


def gemma_3(folder: Path) -> Any:
    """Characters with byte fallback, spaces written as ▁, and runs of spaces and line ends as added tokens."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    controls, pieces = ["<pad>", "<eos>", "<bos>", "<unk>"], [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=controls + pieces, show_progress=False)
    backend.train_from_iterator(LINES, trainer)
    backend.add_tokens([AddedToken(text, normalized=False) for text in ("\n\n", "▁▁", "▁▁▁", "<table>")])
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = [token for token in settings["added_tokens"] if token["content"] not in pieces]
    settings["model"] |= {"byte_fallback": True, "fuse_unk": True}
    return saved(folder, settings, "<eos>")


def saved(folder: Path, settings: dict[str, Any], end: str) -> Any:
    """The tokenizer of a tokenizer.json and of a tokenizer_config.json that names its end token."""
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": end}))
    return build("HuggingFaceTokenizer", folder / "tokenizer.json", no_new_tokens=True)


KINDS = {"llama 2": llama_2, "llama 3": llama_3, "qwen 3": qwen_3, "gemma 3": gemma_3}
