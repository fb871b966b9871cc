"""Megatron files by hand: every key and shape of both spellings, written out, not derived from the code under test."""

from __future__ import annotations

import pytest
import torch

from megatron_llm.weights import megatron
from tests.engine.small_llama import make_config, make_state

LAYER = {
    "input_layernorm.weight": (32,),
    "attention.query_key_value.weight": (96, 32),
    "attention.dense.weight": (32, 48),
    "post_attention_layernorm.weight": (32,),
    "mlp.dense_h_to_4h.weight": (96, 32),
    "mlp.dense_4h_to_h.weight": (32, 48),
}
"""Of a Llama with 8 heads of size 6 in 4 groups and an MLP of 48, in the converter's spelling."""
CONVERTERS = {
    "language_model/embedding/word_embeddings.weight": (512, 32),
    **{f"language_model/transformer/layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()},
    "language_model/transformer/final_layernorm.weight": (32,),
    "language_model/lm_head": (512, 32),
}
"""Two layers and a vocabulary of 421, padded to 512 = 4 x 128 rows."""
HALF = {
    "language_model/encoder/layers.0.input_layernorm.weight": (32,),
    "language_model/encoder/layers.0.self_attention.query_key_value.weight": (48, 32),
    "language_model/encoder/layers.0.self_attention.dense.weight": (32, 24),
    "language_model/encoder/layers.0.post_attention_layernorm.weight": (32,),
    "language_model/encoder/layers.0.mlp.dense_h_to_4h.weight": (48, 32),
    "language_model/encoder/layers.0.mlp.dense_4h_to_h.weight": (32, 24),
}
"""Of the same model in the trainer's spelling: the layer of a tensor rank of two in a pipeline stage of two."""
FIRST = {"language_model/embedding/word_embeddings/weight": (256, 32), **HALF}
LAST = {**HALF, "language_model/encoder/final_layernorm.weight": (32,)}
FALCON_40B = {
    "language_model/embedding/word_embeddings/weight": (512, 32),
    "language_model/encoder/layers.0.input_layernorm.weight": (32,),
    "language_model/encoder/layers.0.input_layernorm.bias": (32,),
    "language_model/encoder/layers.0.mlp_layernorm.weight": (32,),
    "language_model/encoder/layers.0.mlp_layernorm.bias": (32,),
    "language_model/encoder/layers.0.self_attention.query_key_value.weight": (96, 32),
    "language_model/encoder/layers.0.self_attention.dense.weight": (32, 48),
    "language_model/encoder/layers.0.mlp.dense_h_to_4h.weight": (48, 32),
    "language_model/encoder/layers.0.mlp.dense_4h_to_h.weight": (32, 48),
    "language_model/encoder/final_layernorm.weight": (32,),
    "language_model/encoder/final_layernorm.bias": (32,),
}


def keys(model: object, path: str = "") -> dict[str, tuple[int, ...]]:
    """Every tensor of a nested dict by its keys, joined by slashes."""
    if isinstance(model, torch.Tensor):
        return {path.lstrip("/"): tuple(model.shape)}
    assert isinstance(model, dict)
    return {key: shape for name, part in model.items() for key, shape in keys(part, f"{path}/{name}").items()}


def written(folder, config, *, tp=1, pp=1, spelling="trainer"):
    """The keys and shapes in each file that is written."""
    megatron.save(
        folder, "release", config, make_state(config), tp=tp, pp=pp, dtype=torch.float32, extra_args={},
        spelling=spelling,
    )  # fmt: skip
    files = sorted((folder / "release").glob("mp_rank_*/model_optim_rng.pt"))
    return {file.parent.name: keys(torch.load(file, weights_only=False)["model"]) for file in files}


@pytest.mark.parametrize("tied", [False, True])
def test_the_converters_spelling(tmp_path, tied):
    """What hf_to_megatron writes; a tied model has no lm_head."""
    config = make_config(num_layers=2, vocab_size=421, tie_embed_logits=tied)
    expected = {name: shape for name, shape in CONVERTERS.items() if not (tied and name.endswith("lm_head"))}
    assert written(tmp_path, config, spelling="converter") == {"mp_rank_00": expected}


def test_the_trainers_spelling(tmp_path):
    """What checkpoint_util writes at TP 2 x PP 2: the embedding first, norm and head last, layers from 0 in each."""
    config = make_config(num_layers=2, vocab_size=421)
    last = LAST | {"language_model/lm_head": (256, 32)}
    expected = {f"mp_rank_0{rank}_00{stage}": (FIRST, last)[stage] for rank in (0, 1) for stage in (0, 1)}
    assert written(tmp_path, config, tp=2, pp=2) == expected


def test_a_tied_models_last_stage(tmp_path):
    """It holds the embedding's copy under a name of its own, beside the language model."""
    config = make_config(num_layers=2, vocab_size=421, tie_embed_logits=True)
    last = LAST | {"word_embeddings_for_head/weight": (256, 32)}
    expected = {f"mp_rank_0{rank}_00{stage}": (FIRST, last)[stage] for rank in (0, 1) for stage in (0, 1)}
    assert written(tmp_path, config, tp=2, pp=2) == expected


def test_falcon(tmp_path):
    """Norms with biases, two of them side by side in the 40B's, no gate in the MLP, no lm_head."""
    falcon = {"use_rms_norm": False, "glu_activation": None, "parallel_attn": True, "parallel_layernorm": True}
    config = make_config(num_layers=1, vocab_size=421, tie_embed_logits=True, **falcon)
    assert written(tmp_path, config) == {"mp_rank_00": FALCON_40B}
