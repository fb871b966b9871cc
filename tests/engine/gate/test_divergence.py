"""The divergence report: known changes and angles, and what it writes."""

from __future__ import annotations

import json
import math

import pytest
import torch

from megatron_llm.gate import divergence
from run_contract.errors import UserError
from tests.engine.small_llama import make_config, make_state


def spanned(directions, size=64, rows=200):
    """A matrix whose 16 leading right singular vectors are exactly these columns, plus nothing else."""
    left = torch.linalg.qr(torch.randn(rows, directions.shape[1]))[0]
    return left @ torch.diag(torch.linspace(5, 3, directions.shape[1])) @ directions.T


def test_angles_of_a_known_rotation():
    """A subspace turned by 0.01, 30 or 80 degrees in one direction has that largest angle and none elsewhere."""
    torch.manual_seed(1)
    basis = torch.linalg.qr(torch.randn(64, 17, dtype=torch.float64))[0].float()
    for degrees in (0.01, 30.0, 80.0):
        turned = basis[:, :16].clone()
        angle = math.radians(degrees)
        turned[:, 0] = math.cos(angle) * basis[:, 0] + math.sin(angle) * basis[:, 16]
        angles = divergence.principal_angles(spanned(basis[:, :16]), spanned(turned))
        assert angles.max().item() == pytest.approx(degrees, rel=0.02, abs=1e-3)
        assert angles.sort().values[:-1].max().item() < 0.01


def test_change_and_scale():
    """Adding 0.5 everywhere changes by 0.5 on average; equal tensors diverge by nothing; vectors have no angle."""
    weight = torch.randn(40, 30)
    same = divergence.compare("x", weight, weight.clone())
    assert (same.mean_absolute_change, same.max_angle) == (0.0, pytest.approx(0.0, abs=1e-2))
    moved = divergence.compare("x", torch.full((8,), -2.0), torch.full((8,), -1.5))
    assert (moved.mean_absolute_change, moved.relative_change, moved.mean_angle) == (0.5, 0.25, None)


def test_the_report(tmp_path):
    """Every tensor is in the table, embeddings included; only the changed ones moved; the plot is a PNG."""
    config = make_config()
    base = make_state(config)
    new = dict(base)
    new["layers.2.mlp.w2.weight"] = base["layers.2.mlp.w2.weight"] + 0.1
    new["embedding.weight"] = torch.cat([base["embedding.weight"], torch.ones(3, 32)])
    divergence.report(base, new, tmp_path / "d.json")
    table = {one["name"]: one for one in json.loads((tmp_path / "d.json").read_text())}
    assert table.keys() == new.keys()
    moved = [name for name, one in table.items() if one["mean_absolute_change"] > 0]
    assert moved == ["layers.2.mlp.w2.weight"]
    assert table[moved[0]]["mean_absolute_change"] == pytest.approx(0.1, rel=1e-4)
    assert table[moved[0]]["max_angle"] > 1
    assert all((one["mean_angle"] is None) == name.endswith("norm.weight") for name, one in table.items())
    assert {"embedding.weight", "lm_head.weight", "layers.3.attention.wq.weight"} <= table.keys()
    assert (tmp_path / "d.png").read_bytes().startswith(b"\x89PNG")


def test_another_model_is_refused(tmp_path):
    """Other shapes or fewer layers are no base; nothing is written."""
    config = make_config()
    for base in (make_state(make_config(hidden_size=16)), make_state(make_config(num_layers=2))):
        with pytest.raises(UserError, match=r"give the model that training began with as --base_model"):
            divergence.report(base, make_state(config), tmp_path / "d.json")
    assert list(tmp_path.iterdir()) == []
