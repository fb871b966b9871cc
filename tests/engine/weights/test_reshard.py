"""Golden row orders written out by hand, then exact round trips over tensor and pipeline sizes."""

from __future__ import annotations

import pytest
import torch

from megatron_llm.model import canonical_state
from megatron_llm.weights import megatron_layout
from run_contract.errors import UserError
from tests.engine.small_llama import make_config, make_state, same


def rows(*names: str) -> torch.Tensor:
    """One row of four equal numbers a name: q0.1 is query head 0, row 1."""
    kinds = {"q": 1000, "k": 2000, "v": 3000}
    return torch.tensor([[kinds[n[0]] + 10 * int(n[1]) + int(n[3])] * 4 for n in names], dtype=torch.float32)


def test_query_key_value_rows_for_gqa():
    """Per kv group: its queries, its key, its value; q and k rows interleaved from two halves, v untouched."""
    config = make_config(hidden_size=4, num_attention_heads=4, num_attention_heads_kv=2, kv_channels=4)
    query = rows(*(f"q{head}.{row}" for head in range(4) for row in range(4)))
    key = rows(*(f"k{head}.{row}" for head in range(2) for row in range(4)))
    value = rows(*(f"v{head}.{row}" for head in range(2) for row in range(4)))
    expected = rows(
        *("q0.0", "q0.2", "q0.1", "q0.3", "q1.0", "q1.2", "q1.1", "q1.3"),
        *("k0.0", "k0.2", "k0.1", "k0.3", "v0.0", "v0.1", "v0.2", "v0.3"),
        *("q2.0", "q2.2", "q2.1", "q2.3", "q3.0", "q3.2", "q3.1", "q3.3"),
        *("k1.0", "k1.2", "k1.1", "k1.3", "v1.0", "v1.1", "v1.2", "v1.3"),
    )
    fused = megatron_layout.fuse_qkv(config, query, key, value)
    assert fused[:, 0].tolist() == expected[:, 0].tolist()
    for which, original in ((megatron_layout.QUERY, query), (megatron_layout.KEY, key), (megatron_layout.VALUE, value)):
        assert torch.equal(megatron_layout.unfuse_qkv(config, fused, which), original)


def test_rotary_interleave_is_the_contracts_transposition():
    """A head of 6 rows in halves (0 1 2 | 3 4 5) becomes pairs (0 3, 1 4, 2 5); the inverse restores it."""
    head = torch.arange(6.0).unsqueeze(1).expand(6, 3).contiguous()
    assert megatron_layout.interleave(head, 6)[:, 0].tolist() == [0, 3, 1, 4, 2, 5]
    assert torch.equal(megatron_layout.deinterleave(megatron_layout.interleave(head, 6), 6), head)


def test_up_is_above_gate_and_each_rank_restacks_its_part():
    """dense_h_to_4h is [up; gate]; tensor rank 1 of 2 holds the second half of up, then the second half of gate."""
    config = make_config(num_layers=1, ffn_hidden_size=4)
    state = make_state(config)
    state["layers.0.mlp.w3.weight"] = torch.tensor([[30.0], [31], [32], [33]]).expand(4, 32)
    state["layers.0.mlp.w1.weight"] = torch.tensor([[10.0], [11], [12], [13]]).expand(4, 32)
    whole = megatron_layout.rank_state(config, state, 1, 1, (0, 0))[f"layers.0.{megatron_layout.UP_GATE}"]
    assert whole[:, 0].tolist() == [30, 31, 32, 33, 10, 11, 12, 13]
    second = megatron_layout.rank_state(config, state, 2, 1, (1, 0))[f"layers.0.{megatron_layout.UP_GATE}"]
    assert second[:, 0].tolist() == [32, 33, 12, 13]


def test_split_axes_and_stage_numbers():
    """Rows of qkv and vocabulary, columns of dense and dense_4h_to_h; layers count from 0 in each stage."""
    config = make_config()
    state = make_state(config)
    local = megatron_layout.rank_state(config, state, 2, 2, (1, 1))
    assert torch.equal(local[f"layers.0.{megatron_layout.DENSE}"], state["layers.2.attention.wo.weight"][:, 24:])
    assert torch.equal(local[f"layers.1.{megatron_layout.DOWN}"], state["layers.3.mlp.w2.weight"][:, 24:])
    fused = megatron_layout.rank_layer(config, state, 2, 1, 0)[megatron_layout.QKV]
    assert torch.equal(local[f"layers.0.{megatron_layout.QKV}"], fused[48:])
    assert canonical_state.EMBEDDING not in local
    assert local[canonical_state.HEAD].shape == (256, 32)


def test_vocabulary_is_padded_by_repeating_the_last_row():
    """420 rows become 512 = 2 * 128 * 2, the extra ones copies of row 419."""
    config = make_config()
    state = make_state(config)
    parts = [megatron_layout.rank_state(config, state, 2, 1, (rank, 0))[canonical_state.EMBEDDING] for rank in (0, 1)]
    whole = torch.cat(parts)
    assert whole.shape == (512, 32)
    assert torch.equal(whole[:420], state[canonical_state.EMBEDDING])
    assert (whole[420:] == state[canonical_state.EMBEDDING][-1]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "changes", [{}, {"num_attention_heads_kv": 8}, {"tie_embed_logits": True}, {"vocab_size": 131}]
)
@pytest.mark.parametrize("pp", [1, 2])
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cut_and_merged_again_is_the_same_to_the_bit(tp, pp, changes, dtype):
    """Every layout gives back every tensor: GQA, MHA, tied embeddings, odd vocabulary, fp32 and bf16."""
    config = make_config(**changes)
    state = make_state(config, dtype)
    ranks = {(t, p): megatron_layout.rank_state(config, state, tp, pp, (t, p)) for t in range(tp) for p in range(pp)}
    assert same(megatron_layout.merge_ranks(config, ranks), state)
    sizes = [sum(tensor.numel() for tensor in ranks[t, 0].values()) for t in range(tp)]
    assert len(set(sizes)) == 1


def test_sizes_that_do_not_divide_are_refused():
    """TP must divide heads, kv heads and the ffn; PP the layers; the message names what does not divide."""
    for config, tp, pp, name in (
        (make_config(), 3, 1, "num_attention_heads = 8"),
        (make_config(), 8, 1, "num_attention_heads_kv = 4"),
        (make_config(ffn_hidden_size=50), 4, 1, "ffn_hidden_size = 50"),
        (make_config(), 1, 3, "num_layers = 4"),
        (make_config(), 0, 1, "tensor parallel size 0"),
    ):
        with pytest.raises(UserError, match=name):
            megatron_layout.check_sizes(config, tp, pp)


def test_ranks_of_different_checkpoints_are_refused():
    """A copied norm that differs between tensor ranks, or a tied head that is not the embedding, is an error."""
    config = make_config(tie_embed_logits=True)
    state = make_state(config)
    ranks = {(t, p): megatron_layout.rank_state(config, state, 2, 2, (t, p)) for t in (0, 1) for p in (0, 1)}
    head = ranks[0, 1][megatron_layout.TIED_HEAD]
    ranks[0, 1][megatron_layout.TIED_HEAD] = head + 1
    with pytest.raises(UserError, match="tied output layer"):
        megatron_layout.merge_ranks(config, ranks)
    ranks[0, 1][megatron_layout.TIED_HEAD] = head
    ranks[1, 0]["layers.0.input_layernorm.weight"] = torch.zeros(32)
    with pytest.raises(UserError, match=r"input_layernorm.weight differs between tensor ranks"):
        megatron_layout.merge_ranks(config, ranks)
