"""Who reads which samples, and which data is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import sentencepiece

from megatron_llm.flags.parser import parse
from megatron_llm.training.batches import Share, check_fits, identify
from run_contract.errors import UserError


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_sample_is_read_once_and_in_order(ranks: int) -> None:
    """Taken rank by rank, the rows of every round are the samples in order, for any number of ranks."""
    shares = [list(Share(10, 26, 2, rank, ranks)) for rank in range(ranks)]
    assert [number for round_ in zip(*shares, strict=True) for rows in round_ for number in rows] == list(range(10, 26))


def test_a_tokenizer_that_is_not_the_datas_is_refused(tmp_path: Path, tiny_data: Path) -> None:
    """--vocab_file must be the tokenizer that the data's manifest names."""
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten\n" * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(tmp_path / "other"), vocab_size=20, minloglevel=2
    )
    required = "--save s --seq_length 32 --micro_batch_size 2 --train_iters 10 --lr 1e-3 --no_new_tokens"
    argv = [*required.split(), "--data_path", str(tiny_data)]
    args = parse(argv)
    assert identify(args.data, args.given).vocab_size == 131
    args = parse([*argv, "--vocab_file", str(tmp_path / "other.model")])
    with pytest.raises(
        UserError, match=r"the tokenizers are different: .*131 tokens, fingerprint tiny; --vocab_file .*20 tokens"
    ):
        identify(args.data, args.given)


def test_what_does_not_fit_the_model_is_refused(tiny_data: Path) -> None:
    """More kinds of tokens than embeddings, or longer samples than positions."""
    required = "--save s --seq_length 32 --micro_batch_size 2 --train_iters 10 --lr 1e-3"
    args = parse([*required.split(), "--data_path", str(tiny_data)])
    identity = identify(args.data, args.given)
    check_fits(identity, args.data.paths(), args.model.seq_length, 131, 32)
    with pytest.raises(UserError, match="131 kinds of tokens"):
        check_fits(identity, args.data.paths(), args.model.seq_length, 130, 32)
    with pytest.raises(UserError, match="max_position_embeddings 31"):
        check_fits(identity, args.data.paths(), args.model.seq_length, 131, 31)
