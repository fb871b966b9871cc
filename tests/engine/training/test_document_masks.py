"""Documents packed into one sample are learnt as if each were alone, on any layout of ranks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import load as load_tensors
from torch.nn import functional

from megatron_llm.checkpoint import folder as checkpoint
from megatron_llm.data import gpt_dataset
from megatron_llm.data.manifest import beside
from megatron_llm.flags.parser import parse
from megatron_llm.model.attention import attend
from megatron_llm.model.config import ModelConfig
from megatron_llm.model.llama import Llama, initial_weights, shapes
from megatron_llm.training.document_masks import Masks, with_normalisation
from run_contract.errors import InputsMissing, UserError
from tests.engine import engine_ranks
from tests.engine.hf_reference import hf_model, theirs
from tests.engine.model.test_llama import VARIANTS
from tests.engine.tiny_run import EOD, flags, metrics, tensors, write_data

ALL = ("--reset_position_ids", "--reset_attention_mask", "--eod_mask_loss")
BRIEF = ("--train_iters", 3, "--lr_decay_iters", 20, "--eval_interval", 3)
TP, PP = "--tensor_model_parallel_size", "--pipeline_model_parallel_size"
MICRO, MINE = "--micro_batch_size", ("--loss_normalisation", "micro")
LAYOUTS: dict[int, dict[str, tuple[object, ...]]] = {
    1: {
        "alone": ALL,
        "in rows": (*ALL, MICRO, 1),
        "at once": (*ALL, MICRO, 8),
        "scaled": (*ALL, "--fp16", "--loss_scale", 4096),
        "scaled, in rows": (*ALL, MICRO, 1, "--fp16", "--loss_scale", 64),
        "of means": (*ALL, *MINE),
        "unmasked": (),
        "unmasked, of means": MINE,
    },
    2: {
        "data ranks, selective": (*ALL, MICRO, 1, "--recompute_granularity", "selective"),
        "tensor ranks": (*ALL, MICRO, 4, TP, 2),
        "tensor ranks, sequence, full": (*ALL, TP, 2, "--sequence_parallel", "--recompute_granularity", "full"),
        "pipeline ranks": (*ALL, MICRO, 1, PP, 2),
        "interleaved": (*ALL, MICRO, 4, PP, 2, "--num_layers_per_virtual_pipeline_stage", 1),
    },
    4: {
        "pipeline and data ranks": (*ALL, PP, 2),
        "interleaved, data ranks": (*ALL, MICRO, 1, PP, 2, "--num_layers_per_virtual_pipeline_stage", 1),
    },
}
"""Micro-batches are of 2 samples where nothing else is said, global batches of 8."""
EQUAL = ("in rows", "at once", *LAYOUTS[2], *LAYOUTS[4])
"""What is to give the losses and gradients of `alone`."""
SAMPLE = torch.tensor([[9, 8, 7, EOD, 6, 5, EOD, EOD, 4, 3, 9, 9, 8, 7, 3, 4], [EOD, 9, 9, 4, 3, *[8] * 10, EOD]])
"""Documents of 4, 3, 1 and 8 tokens, and of 1 and 15."""
LENGTHS = ((4, 3, 1, 8), (1, 15))


def models(config: ModelConfig, recompute: Any = None) -> tuple[Any, Llama]:
    """Hugging Face's model with random weights, and ours with the same."""
    torch.manual_seed(0)
    reference, model = hf_model(config), Llama(config, recompute)
    model.load_state_dict(theirs(config, {name: p.detach() for name, p in reference.named_parameters()}))
    return reference, model


def test_where_documents_end() -> None:
    """An EOD still belongs to its document: positions and numbers change after it. As an input it is not counted."""
    found = Masks(True, True, True, EOD).inputs(SAMPLE)
    assert found["positions"].tolist() == [[*range(4), *range(3), 0, *range(8)], [0, *range(15)]]
    assert found["documents"].tolist() == [[0] * 4 + [1] * 3 + [2] + [3] * 8, [0] + [1] * 15]
    assert found["counted"].tolist() == [[token != EOD for token in row] for row in SAMPLE.tolist()]
    assert Masks(eod=EOD).inputs(SAMPLE) == {}


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
@pytest.mark.parametrize("kind", ["grouped queries", "Mistral, longer than its window", "Llama 3.1", "Falcon 40B"])
@pytest.mark.parametrize("positions", [False, True])
def test_packed_documents_are_as_if_alone(
    tiny_config: ModelConfig, kind: str, recompute: Any, *, positions: bool
) -> None:
    """With the attention mask reset, logits and gradients are those of transformers' model on each document alone;
    a sliding window of 5 acts within documents too."""
    config = replace(tiny_config, **VARIANTS[kind])
    if config.sliding_window_size:
        config = replace(config, sliding_window_size=5)
    reference, model = models(config, recompute)
    masks = Masks(positions, True, False, EOD)
    logits = model(SAMPLE, **masks.inputs(SAMPLE))
    documents = [part for row, sizes in zip(SAMPLE, LENGTHS, strict=True) for part in row.split(sizes)]
    expected = torch.cat([reference(document.unsqueeze(0)).logits[0] for document in documents])
    torch.testing.assert_close(logits.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    assert (model(SAMPLE) - logits).abs().max() > 0.1, "without the mask they are others"
    for output in (logits.flatten(0, 1), expected):
        output.logsumexp(-1).mean().backward()
    gradients = theirs(config, {name: parameter.grad for name, parameter in reference.named_parameters()})
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-5, rtol=1e-5)


def test_heads_are_repeated_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off the CPU a mask goes with as many key/value heads as query heads, each before the queries that use it."""
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    cos, sin, mask = torch.ones(6, 8), torch.zeros(6, 8), torch.zeros(6, 6)
    expected = attend(q, k, v, cos, sin, mask)
    seen = []

    def kernel(q: Any, k: Any, v: Any, mask: Any, *, is_causal: bool, enable_gqa: bool) -> Any:
        seen.append((k.shape[1], v.shape[1], is_causal, enable_gqa))
        return plain(q, k, v, mask)

    plain = functional.scaled_dot_product_attention
    monkeypatch.setattr(functional, "scaled_dot_product_attention", kernel)
    monkeypatch.setattr(torch.Tensor, "is_cpu", False)
    torch.testing.assert_close(attend(q, k, v, cos, sin, mask), expected)
    assert seen == [(4, 4, False, False)]


def test_positions_alone_begin_again(tiny_config: ModelConfig) -> None:
    """Without the attention mask, logits are transformers' with these positions and attention to all before."""
    reference, model = models(tiny_config)
    found = Masks(reset_position_ids=True, eod=EOD).inputs(SAMPLE)
    expected = reference(SAMPLE, position_ids=found["positions"], attention_mask=torch.ones_like(SAMPLE)).logits
    logits = model(SAMPLE, **found)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (model(SAMPLE) - logits).abs().max() > 0.1


def test_the_loss_counts_what_is_not_after_an_eod(tiny_config: ModelConfig) -> None:
    """It is the mean of -log p over the other inputs, worked out in NumPy; with none at all it is 0, not NaN."""
    model = models(tiny_config)[1]
    tokens, targets = SAMPLE[:, :-1], SAMPLE[:, 1:]
    masks = Masks(eod_mask_loss=True, eod=EOD)
    logits = model(tokens).detach().double().numpy()
    odds = [
        np.log(np.exp(logits[row, at]).sum()) - logits[row, at, targets[row, at]]
        for row in range(2)
        for at in range(15)
        if tokens[row, at] != EOD
    ]
    assert len(odds) == 26
    assert model(tokens, targets, **masks.inputs(tokens)).item() == pytest.approx(np.mean(odds), rel=1e-6)
    ended = torch.full((2, 15), EOD)
    loss = model(ended, ended, **masks.inputs(ended))
    loss.backward()
    assert loss == 0.0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


@pytest.fixture(scope="module")
def uneven_data(tmp_path_factory: pytest.TempPathFactory, tiny_config: ModelConfig) -> Path:
    """Prefix of documents so unlike in length that micro-batches count very different numbers of tokens."""
    return write_data(tmp_path_factory.mktemp("uneven"), tiny_config.vocab_size, append_eod=True, uneven=True)


@pytest.fixture(scope="module")
def saves(tmp_path_factory: pytest.TempPathFactory, uneven_data: Path) -> dict[str, Path]:
    """The --save folder of 3 iterations at every layout, with a checkpoint of each."""
    root = tmp_path_factory.mktemp("masks")
    folders = {name: root / name.replace(" ", "-") for layouts in LAYOUTS.values() for name in layouts}
    for size, layouts in LAYOUTS.items():
        argvs = [
            flags(uneven_data, folders[name], *BRIEF, "--init_method_std", 0.2, "--save_interval", 1, *more)
            for name, more in layouts.items()
        ]
        engine_ranks.run_several(root, argvs, size)
    return folders


def first_moments(save: Path, config: ModelConfig) -> dict[str, torch.Tensor]:
    """Adam's after the first update: the gradient, as clipped, by 10."""
    read = {name: torch.empty(shape) for name, shape in shapes(config).items()}
    reader = checkpoint._Reader(checkpoint.iteration_folder(save, 1))
    stored = {f"optimizer.exp_avg.{name}": tensor for name, tensor in read.items()}
    load_tensors(stored, storage_reader=reader, planner=checkpoint._Planner(), no_dist=True)
    return read


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("layout", EQUAL)
def test_layouts_and_micro_batches_give_equal_losses_and_gradients(
    saves: dict[str, Path], tiny_config: ModelConfig, layout: str
) -> None:
    """Losses, norms, the validation loss and the first gradients do not depend on how ranks share the global batch, nor
    on how it is cut into micro-batches; without masks, and as the mean of micro-batches' means, they are different."""
    alone, spread, means, unmasked = (metrics(saves[name]) for name in ("alone", layout, "of means", "unmasked"))
    assert len(alone) == len(spread) == 4
    for one, other, mean, plain in zip(alone, spread, means, unmasked, strict=True):
        assert other == pytest.approx(one, rel=1e-5)
        for name in {"lm_loss", "grad_norm", "validation_loss"} & one.keys():
            assert min(abs(mean[name] / one[name] - 1), abs(plain[name] / one[name] - 1)) > 5e-5
    expected = first_moments(saves["alone"], tiny_config)
    for name, moment in first_moments(saves[layout], tiny_config).items():
        scale = expected[name].abs().max().item()
        torch.testing.assert_close(moment, expected[name], rtol=0, atol=1e-5 * scale)


def test_a_loss_scale_changes_nothing(saves: dict[str, Path]) -> None:
    """In fp16 two scales and sizes of micro-batches give about the same losses and norms, those of fp32."""
    for name in ("scaled", "scaled, in rows"):
        for one, other in zip(metrics(saves["alone"]), metrics(saves[name]), strict=True):
            for number in {"lm_loss", "grad_norm", "validation_loss"} & one.keys():
                assert other[number] == pytest.approx(one[number], rel=5e-3)


def test_without_masks_the_normalisation_changes_nothing(saves: dict[str, Path]) -> None:
    """Where every token counts the two are the same to the bit: losses, and weights and moments at the end."""
    assert metrics(saves["unmasked"]) == metrics(saves["unmasked, of means"])
    assert tensors(saves["unmasked"], 3) == tensors(saves["unmasked, of means"], 3)


def test_a_step_counts_tokens_or_micro_batches(
    saves: dict[str, Path], uneven_data: Path, tiny_config: ModelConfig
) -> None:
    """The first loss is the mean over all counted tokens, or with `micro` that of the micro-batches' means."""
    model = Llama(tiny_config)
    model.load_state_dict(dict(initial_weights(tiny_config, 1234, 0.2)))
    paths = gpt_dataset.DataPaths.of([str(uneven_data)], (None, None, None), "90,10,0")
    plan = gpt_dataset.plan(paths, 1234, 32, (24, 16, 0))[0]
    assert plan
    train = gpt_dataset.open_split(plan, None)
    masks, losses = Masks(True, True, False, EOD), []
    for first in range(0, 8, 2):
        batch = torch.from_numpy(np.stack([train[first], train[first + 1]]))
        tokens, targets = batch[:, :-1], batch[:, 1:]
        odds = model(tokens, **masks.inputs(tokens)).detach().log_softmax(-1).gather(-1, targets.unsqueeze(-1))
        losses.append(-odds[tokens != EOD])
    assert len({len(micro) for micro in losses}) > 1
    assert metrics(saves["alone"])[0]["lm_loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-6)
    means = np.mean([micro.mean() for micro in losses])
    assert metrics(saves["of means"])[0]["lm_loss"] == pytest.approx(means, rel=1e-6)


def asked(prefixes: list[object], *more: str) -> Masks:
    """What flags and data ask for."""
    required = "--save s --seq_length 32 --micro_batch_size 2 --train_iters 10 --lr 1e-3"
    return Masks.of(parse([*required.split(), "--data_path", *map(str, prefixes), *more]).data)


def copied(data: Path, folder: Path, **changes: object) -> Path:
    """The manifest alone of the data, changed."""
    manifest = json.loads(beside(data, ".json").read_text()) | changes
    beside(folder / "other", ".json").write_text(json.dumps(manifest))
    return folder / "other"


def test_the_eod_is_the_manifests(tmp_path: Path, tiny_data: Path, separated_data: Path) -> None:
    """All parts of a blend must have it at the end of their documents, the same one; without the flags none is read."""
    other = copied(separated_data, tmp_path)
    assert asked([0.5, separated_data, 0.5, other], "--eod_mask_loss") == Masks(eod_mask_loss=True, eod=EOD)
    assert asked([tmp_path / "nothing"]) == Masks()
    with pytest.raises(
        InputsMissing,
        match=r"--reset_attention_mask: the manifest of the data says which token .*nothing\.json does not exist",
    ):
        asked([tmp_path / "nothing"], "--reset_attention_mask")
    with pytest.raises(UserError, match=r"--eod_mask_loss: no EOD token ends the documents of "):
        asked([0.5, separated_data, 0.5, tiny_data], "--eod_mask_loss")
    copied(separated_data, tmp_path, eod=3)
    with pytest.raises(UserError, match=r"documents end with token 2 in .*, token 3 in .*other"):
        asked([0.5, separated_data, 0.5, other], *ALL)


def test_a_run_keeps_its_normalisation() -> None:
    """A new run takes the global batch's tokens; one goes on as it began, from before the flag by micro-batches, and
    the flag cannot change it. Without the mask there is nothing to keep."""
    required = "--save s --seq_length 32 --micro_batch_size 2 --train_iters 10 --lr 1e-3 --data_path d"

    def found(more: str, saved: Any) -> str | None:
        return with_normalisation(parse(f"{required} {more}".split()).data, saved).loss_normalisation

    before, now = {"arguments": {"eod_mask_loss": True}}, {"arguments": {"loss_normalisation": "global"}}
    assert found("--eod_mask_loss", {}) == "global"
    assert found("--eod_mask_loss --loss_normalisation micro", {}) == "micro"
    assert found("--eod_mask_loss", before) == "micro"
    assert found("--eod_mask_loss --loss_normalisation micro", before) == "micro"
    assert found("--eod_mask_loss", now) == "global"
    assert found("--loss_normalisation micro", now) == "micro"
    with pytest.raises(UserError, match="--loss_normalisation global: this run was trained with micro; keep it so"):
        found("--eod_mask_loss --loss_normalisation global", before)
    with pytest.raises(UserError, match="--loss_normalisation micro: this run was trained with global"):
        found("--eod_mask_loss --loss_normalisation micro", now)


def test_masks_may_not_change_within_a_run(tmp_path: Path, separated_data: Path) -> None:
    """A checkpoint from before these flags existed goes on without them; with one of them it is refused, and a run
    with them does not go on without."""
    save = tmp_path / "save"
    argv = flags(separated_data, save, "--eval_iters", 0)
    assert engine_ranks.run(tmp_path, [*argv, "--exit_interval", 1], size=1)[0] == [75]
    path = save / "iter_0000001" / "state.json"
    state = json.loads(path.read_text())
    for name in ("reset_position_ids", "reset_attention_mask", "eod_mask_loss"):
        assert state["arguments"].pop(name) is False
    path.write_text(json.dumps(state))
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 2, "--eod_mask_loss"], size=1)
    assert codes == [2]
    assert "iter_0000001 was trained with eod_mask_loss False, and now it is True: " in text
    codes, text = engine_ranks.run(tmp_path, [*argv, "--exit_interval", 2], size=1)
    assert codes == [75], text
    anew = flags(separated_data, tmp_path / "anew", "--eval_iters", 0, "--load", save, "--finetune", *ALL)
    assert engine_ranks.run(tmp_path, [*anew, "--exit_interval", 1], size=1)[0] == [75]
    codes, text = engine_ranks.run(tmp_path, [arg for arg in anew if arg != ALL[1]], size=1)
    assert codes == [2]
    assert "iter_0000001 was trained with reset_attention_mask True, and now it is False: " in text
    path = tmp_path / "anew" / "iter_0000001" / "state.json"
    state = json.loads(path.read_text())
    assert state["arguments"].pop("loss_normalisation") == "global"
    path.write_text(json.dumps(state))
    assert engine_ranks.run(tmp_path, [*anew, "--exit_interval", 2], size=1)[0] == [75]
    state = json.loads((tmp_path / "anew" / "iter_0000002" / "state.json").read_text())
    assert state["arguments"]["loss_normalisation"] == "micro"
