"""Checkpoints and data that do not belong together end real ranks with one clear line, and none of them hangs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_llm.data.manifest import beside
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import initial_weights
from megatron_llm.weights import megatron
from tests.engine import engine_ranks
from tests.engine.engine_ranks import Ranks
from tests.engine.hf_reference import hf_model, theirs
from tests.engine.tiny_run import FALCON, RUN, flags, metrics, write_data

BY_CHECKPOINT = "--use_checkpoint_args"
PP = "--pipeline_model_parallel_size"
NO_EVALUATION = ("--eval_iters", 0)


@dataclass(frozen=True)
class Places:
    """What the command lines name."""

    data: Path
    other_tokenizer: Path
    """The same tokens, said to be of another tokenizer."""
    unknown: Path
    """Without a manifest, of a larger vocabulary."""
    llama: Path
    falcon: Path
    """Megatron layouts."""
    cut: Path
    """The same as `llama`, its file cut short."""
    gpt2: Path
    """A Hugging Face folder."""
    run: Path
    """--save of a run stopped after two iterations."""
    cut_run: Path
    """A copy of it whose checkpoint is cut short."""


def cut_short(path: Path) -> None:
    """Lose the last bytes of a file."""
    path.write_bytes(path.read_bytes()[:-100])


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, tiny_config: ModelConfig) -> Places:
    """All of them, made once."""
    root = tmp_path_factory.mktemp("places")
    for name in ("other", "unknown", "gpt2"):
        (root / name).mkdir()
    other, unknown = write_data(root / "other", tiny_config.vocab_size), write_data(root / "unknown", 500)
    manifest = json.loads(beside(other, ".json").read_text()) | {"tokenizer_fingerprint": "another"}
    beside(other, ".json").write_text(json.dumps(manifest))
    beside(unknown, ".json").unlink()
    falcon = replace(
        tiny_config,
        num_attention_heads_kv=1,
        ffn_hidden_size=128,
        tie_embed_logits=True,
        use_rms_norm=False,
        glu_activation=None,
        parallel_attn=True,
    )
    for name, config in (("llama", tiny_config), ("falcon", falcon)):
        weights = dict(initial_weights(config, 3, 0.1))
        megatron.save(
            root / name, "release", config, weights, tp=1, pp=1, dtype=torch.float32, extra_args={"seq_length": 32}
        )
    shutil.copytree(root / "llama", root / "cut")
    cut_short(root / "cut" / "release" / "mp_rank_00" / "model_optim_rng.pt")
    (root / "gpt2" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    argv = flags(tiny_data, root / "run", *NO_EVALUATION, "--exit_interval", 2)
    assert engine_ranks.run(root, argv, size=1)[0] == [75]
    shutil.copytree(root / "run", root / "cut_run")
    cut_short(root / "cut_run" / "iter_0000002" / "__0_0.distcp")
    return Places(tiny_data, other, unknown, *(root / n for n in ("llama", "falcon", "cut", "gpt2", "run", "cut_run")))


Make = Callable[[Places, Path], list[object]]
MISTAKES: dict[str, tuple[Make, int, str]] = {
    "a Falcon's checkpoint for a Llama": (
        lambda p, save: [*RUN.split(), "--data_path", p.data, "--save", save, "--load", p.falcon, BY_CHECKPOINT],
        2,
        "/falcon has a different architecture: it is a Falcon, and --model_name is llama2",
    ),
    "a Llama's checkpoint for a Falcon": (
        lambda p, save: flags(p.data, save, "--load", p.llama, geometry=FALCON),
        2,
        "/llama has a different architecture: it is no Falcon but",
    ),
    "a run's own checkpoint for a Falcon": (
        lambda p, _: flags(p.data, p.run, geometry=FALCON),
        2,
        "/run/iter_0000002 has a different architecture",
    ),
    "an architecture that does not exist here": (
        lambda p, save: flags(p.data, save, "--load", p.gpt2),
        2,
        "/gpt2/config.json: architecture GPT2LMHeadModel is not supported; supported are LlamaForCausalLM",
    ),
    "other heads": (
        lambda p, save: flags(p.data, save, "--load", p.llama, "--num_attention_heads", 8, "--kv_channels", 4),
        2,
        "/llama has num_attention_heads 4 (flags: 8), kv_channels 8 (flags: 4); correct the flags or pass --use_check",
    ),
    "a Megatron file cut short": (
        lambda p, save: flags(p.data, save, "--load", p.cut),
        2,
        "mp_rank_00/model_optim_rng.pt cannot be read, it may be truncated",
    ),
    "the only checkpoint of --load cut short": (
        lambda p, save: flags(p.data, save, "--load", p.cut_run),
        2,
        "iter_0000002 does not verify: __0_0.distcp has",
    ),
    "its weights cut short": (
        lambda p, save: flags(p.data, save, "--load", p.cut_run, "--finetune"),
        3,
        "cut_run holds no checkpoint that verifies",
    ),
    "a run goes on with another tokenizer": (
        lambda p, _: flags(p.other_tokenizer, p.run, *NO_EVALUATION),
        2,
        "/run/iter_0000002 was trained on data of a different tokenizer (fingerprint tiny, now another)",
    ),
    "a run goes on with other data": (
        lambda p, _: flags(p.data, p.run, *NO_EVALUATION, "--data_path", 0.5, p.data, 0.5, p.data),
        2,
        "/run/iter_0000002 was trained with data ",
    ),
    "parts of a blend of two tokenizers": (
        lambda p, save: flags(p.data, save, "--data_path", 0.5, p.data, 0.5, p.other_tokenizer),
        2,
        "the tokenizers are different: the data ",
    ),
    "too few micro-batches for the pipeline": (
        lambda p, save: flags(p.data, save, PP, 2, "--global_batch_size", 2),
        2,
        "--global_batch_size 2 gives each rank 1 micro-batches an update; a pipeline of 2 stages needs at least 2",
    ),
    "layers that do not divide": (
        lambda p, save: flags(p.data, save, PP, 2, "--num_layers", 3),
        2,
        "--pipeline_model_parallel_size 2 does not divide the model's 3 layers",
    ),
    "too few documents for the split": (
        lambda p, save: flags(p.data, save, "--split", "999,1,0"),
        2,
        "--split 999,1,0 gives valid 0 of 200 documents with 0 tokens in all, but one sample needs 33",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_line_from_rank_0(tmp_path: Path, places: Places, mistake: str) -> None:
    """Both ranks exit with the same code, without a traceback; nothing is saved."""
    make, code, message = MISTAKES[mistake]
    save = tmp_path / "save"
    engine_ranks.fails(tmp_path, make(places, save), code, message)
    assert not list(save.glob("iter_*"))


def test_tokens_of_another_tokenizer_without_a_manifest(tmp_path: Path, places: Places) -> None:
    """It is seen when such a token is met: all ranks end after one line, nothing is saved."""
    argv = flags(places.unknown, tmp_path / "save", "--load", places.llama)
    engine_ranks.fails(
        tmp_path, argv, 2, "model's embedding has only 131 rows; tokenise with the model's own tokenizer"
    )
    printed = (tmp_path / "rank-0.txt").read_text()
    assert "tiny_text_document.json is missing, so it is not checked that this data fits the tokenizer" in printed
    assert not list((tmp_path / "save").glob("iter_*"))


def poisoned_finetune(argv: Sequence[str]) -> None:
    """The script, on whose rank 1 the micro-batch of number POISONED has the token -7."""
    from megatron_llm.training import batches

    stack, number = batches._stack, count(1)

    def poisoned(rows: list[Any]) -> torch.Tensor:
        batch = stack(rows)
        if next(number) == int(os.environ["POISONED"]) and os.environ["RANK"] == "1":
            batch[1, 5] = -7
        return batch

    batches._stack = poisoned
    engine_ranks._finetune(argv)


@pytest.mark.parametrize(("layout", "poisoned"), [("", 5), ("", 6), (f"{PP} 2", 9), (f"{PP} 2", 10)])
def test_a_token_that_only_one_rank_meets(tmp_path: Path, tiny_data: Path, layout: str, poisoned: int) -> None:
    """Both ranks end with the one line of rank 0, in a step or an evaluation, and what was being saved is published."""
    save = tmp_path / "save"
    more = ("--save_interval", 2, "--eval_interval", 2 if poisoned % 2 else 4, *layout.split())
    ranks = Ranks(tmp_path, flags(tiny_data, save, *more), 2, {"POISONED": str(poisoned)}, main=poisoned_finetune)
    assert ranks.wait() == [2, 2], ranks.text()
    assert ranks.text().count("error: the data has token -7, but the model's embedding has only 131 rows") == 1
    assert "Traceback" not in ranks.text()
    assert ranks.text(1) == ""
    assert [path.name for path in save.glob("iter_*")] == ([] if poisoned % 2 else ["iter_0000002"])


def test_compiling_without_a_compiler(tmp_path: Path, places: Places) -> None:
    """It is said before anything is built."""
    argv = flags(places.data, tmp_path / "save", "--torch_compile")
    codes, text = engine_ranks.run(tmp_path, argv, size=1, CXX="no-such-compiler")
    assert codes == [2]
    assert "error: --torch_compile needs a C++ compiler, and no-such-compiler is not found" in text


def test_the_only_checkpoint_cut_short_means_to_begin_anew(tmp_path: Path, places: Places) -> None:
    """The run says that it does, and ends in the losses of one that never had the checkpoint."""
    save = tmp_path / "save"
    shutil.copytree(places.cut_run, save)
    argv = flags(places.data, save, *NO_EVALUATION)
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 2], size=1)
    assert codes == [75], text
    assert "iter_0000002 is skipped: __0_0.distcp has" in text
    assert f"no checkpoint in {save} verifies: the run begins anew from random weights" in text
    assert metrics(save) == metrics(places.run)
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 3], size=1)
    assert codes == [75], text
    assert f"continuing from {save / 'iter_0000002'}" in text


def test_a_hugging_face_folder_is_a_start(tmp_path: Path, tiny_data: Path, tiny_config: ModelConfig) -> None:
    """The first loss from one is the loss from the Megatron layout of the same weights."""
    model, folders = hf_model(tiny_config), (tmp_path / "hf", tmp_path / "megatron")
    model.save_pretrained(folders[0])
    weights = theirs(tiny_config, {name: parameter.detach() for name, parameter in model.named_parameters()})
    megatron.save(
        folders[1], "release", tiny_config, weights, tp=1, pp=1, dtype=torch.float32, extra_args={"seq_length": 32}
    )
    losses = []
    for load in folders:
        save = tmp_path / f"save-{load.name}"
        argv = flags(tiny_data, save, *NO_EVALUATION, "--load", load, "--exit_interval", 1)
        codes, text = engine_ranks.run(tmp_path, argv, size=1)
        assert codes == [75], text
        losses.append(metrics(save))
    assert losses[0] == losses[1]
