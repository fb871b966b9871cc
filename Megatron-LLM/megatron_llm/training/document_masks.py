"""Documents within a sample: where positions begin again, what attention sees, which tokens count in the loss.

A document ends with its EOD, which still belongs to it; what follows is the next one. As Megatron's
--reset_position_ids, --reset_attention_mask and --eod_mask_loss have it, which all look at the input tokens.
With --eod_mask_loss, --loss_normalisation says what the mean loss is taken over: the counted tokens of the global
batch, or, as Megatron-LLM does, first those of each micro-batch, so that the result depends on their size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_llm.data.manifest import Manifest
from megatron_llm.flags.arguments import Arguments
from run_contract.errors import InputsMissing, UserError

FLAGS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
GLOBAL, MICRO = "global", "micro"
"""What --loss_normalisation may be."""


@dataclass(frozen=True)
class Masks:
    """Which of the three are asked for, the token that ends a document, and how the loss is normalised."""

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    eod: int = -1
    loss_normalisation: str = GLOBAL

    @property
    def over_global_batch(self) -> bool:
        """Whether a micro-batch's loss depends on how many tokens count in the whole global batch."""
        return self.eod_mask_loss and self.loss_normalisation == GLOBAL

    @classmethod
    def of(cls, args: Arguments) -> Masks:
        """What the flags ask for, with the EOD of the data's manifests. Raises UserError, InputsMissing."""
        asked = {name: getattr(args, name) for name in FLAGS}
        if not any(asked.values()):
            return cls()
        flags = " ".join(f"--{name}" for name, given in asked.items() if given)
        found: dict[int, str] = {}
        for prefix in args.data().prefixes():
            try:
                manifest = Manifest.read(prefix)
            except InputsMissing as error:
                raise InputsMissing(
                    f"{flags}: which token ends a document is told by the manifest, and {error}"
                ) from error
            if not manifest.append_eod:
                raise UserError(
                    f"{flags}: the documents of {prefix} are not separated, no EOD ends them; tokenise them with "
                    "preprocess_data.py --append_eod, or leave these flags out"
                )
            found[manifest.eod] = f"token {manifest.eod} in {prefix}"
        if len(found) > 1:
            raise UserError(
                f"{flags}: documents end with {', '.join(found.values())}; tokenise all of them with one tokenizer "
                "and the same flags"
            )
        return cls(**asked, eod=next(iter(found)), loss_normalisation=args.loss_normalisation or GLOBAL)

    def inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """What the model takes beside tokens (b, s), each (b, s), nothing that is not asked for: `positions` and
        `documents` (numbers within the sample), int64; `counted` in the loss, bool."""
        found, ends = {}, tokens == self.eod
        if self.reset_position_ids:
            index = torch.arange(tokens.shape[1], device=tokens.device)
            begins = ends.roll(1, dims=1)
            begins[:, 0] = True
            found["positions"] = index - torch.where(begins, index, 0).cummax(1).values
        if self.reset_attention_mask:
            found["documents"] = ends.cumsum(1) - ends.long()
        if self.eod_mask_loss:
            found["counted"] = ~ends
        return found

    def number(self, tokens: Tensor) -> int:
        """How many of these input tokens are counted in the loss."""
        return int((tokens != self.eod).sum()) if self.eod_mask_loss else tokens.numel()


NONE = Masks()


def with_normalisation(args: Arguments, saved: Mapping[str, Any]) -> Arguments:
    """The arguments with --loss_normalisation decided: as given, else as the run began that is continued, else global.

    saved: the state.json of the checkpoint being continued, or nothing; runs from before the flag existed began with
    `micro`. Raises UserError when the flag would change what a run with --eod_mask_loss learns.
    """
    asked = args.loss_normalisation
    began: Any = asked or GLOBAL
    if saved and args.eod_mask_loss:
        began = saved["arguments"].get("loss_normalisation", MICRO)
    if asked not in (None, began):
        raise UserError(
            f"--loss_normalisation {asked}: this run was trained with {began}; keep it so, or begin a new run from its "
            "checkpoint with --finetune and another --save folder"
        )
    return replace(args, loss_normalisation=began)
