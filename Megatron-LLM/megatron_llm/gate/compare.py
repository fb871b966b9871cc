"""Measures how closely two models agree on the same tokens: logits, losses, and where hidden states begin to differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from run_contract.errors import UserError

PARTING = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.05}
"""Largest difference of hidden states that agree, as a share of their largest value."""


@dataclass(frozen=True)
class Comparison:
    """The comparison of one batch: absolute logit errors, share of positions with equal argmax, losses in nats."""

    max_error: float
    mean_error: float
    argmax_agreement: float
    our_loss: float
    their_loss: float
    spread: float
    """Standard deviation of their logits: where it is small, even wrong weights make only small errors."""

    def __str__(self) -> str:
        return (
            f"logit error max={self.max_error:.6f} mean={self.mean_error:.6f} | argmax agreement "
            f"{self.argmax_agreement:.2%} | loss ours={self.our_loss:.6f} theirs={self.their_loss:.6f} "
            f"difference={self.loss_difference:.6f}"
        )

    @property
    def loss_difference(self) -> float:
        """The absolute difference of the losses in nats."""
        return abs(self.our_loss - self.their_loss)

    def passes(self, tolerance: float, max_tolerance: float | None) -> bool:
        """Whether the errors are within both tolerances; NaN is not.

        The tolerance of the mean error is relative where the logits spread by less than 1. It also applies to the loss,
        which our model may have computed in a different way than from the logits.
        """
        allowed = tolerance * min(1.0, self.spread)
        within_max = max_tolerance is None or self.max_error <= max_tolerance
        return self.mean_error <= allowed and self.loss_difference <= tolerance and within_max


def compare(ours: Tensor, theirs: Tensor, labels: Tensor, our_loss: float | None = None) -> Comparison:
    """Compare the logits (b, s, V) of both models, given labels (b, s) int64. Raises UserError when the shapes differ.

    our_loss: the loss, if our model has computed it itself.
    """
    if ours.shape != theirs.shape:
        raise UserError(
            f"our logits have shape {tuple(ours.shape)}, theirs {tuple(theirs.shape)}: the two vocabularies are "
            "different; compare with the model that the weights come from"
        )
    ours, theirs = ours.float().cpu(), theirs.float().cpu()
    error = (ours - theirs).abs()
    losses = [nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).item() for logits in (ours, theirs)]
    return Comparison(
        max_error=error.max().item(),
        mean_error=error.mean().item(),
        argmax_agreement=(ours.argmax(-1) == theirs.argmax(-1)).float().mean().item(),
        our_loss=losses[0] if our_loss is None else our_loss,
        their_loss=losses[1],
        spread=theirs.std().item(),
    )


def hidden_states(modules: Sequence[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """The output of every module during `run`."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: object, output: Any) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return outputs


def their_hidden_states(model: Any, tokens: Tensor) -> list[Tensor]:
    """The outputs of a Transformers model's embedding and layers, on the CPU."""
    inner = model.base_model
    layers = inner.h if hasattr(inner, "h") else inner.layers
    outputs = hidden_states([model.get_input_embeddings(), *layers], lambda: model(input_ids=tokens))
    return [output.cpu() for output in outputs]


def first_parting(ours: Sequence[Tensor], theirs: Sequence[Tensor], dtype: torch.dtype) -> str:
    """The first place where the outputs differ: `embedding`, `layer N`, or `output` if all of these agree."""
    names = ["embedding", *(f"layer {number}" for number in range(len(theirs) - 1))]
    for name, mine, other in zip(names, ours, theirs, strict=True):
        a, b = mine.float(), other.float()
        if not (a - b).abs().max() <= PARTING[dtype] * b.abs().max():
            return name
    return "output"


def report(
    done: Sequence[Comparison], tolerance: float, max_tolerance: float | None, parting: str | None
) -> dict[str, Any]:
    """The report: the worst values of all batches, the tolerances, and the values of each batch."""
    return {
        "batches": len(done),
        "max_error": max(batch.max_error for batch in done),
        "mean_error": max(batch.mean_error for batch in done),
        "argmax_agreement": min(batch.argmax_agreement for batch in done),
        "loss_difference": max(batch.loss_difference for batch in done),
        "tolerance": tolerance,
        "max_tolerance": max_tolerance,
        "first_parting": parting,
        "comparisons": [asdict(batch) for batch in done],
    }
