"""How documents within a sample are separated: positions that restart, attention within a document, tokens in the loss.

A document ends with its EOD token, which still belongs to it; the next token begins the next document. The three flags
--reset_position_ids, --reset_attention_mask and --eod_mask_loss work as in Megatron: all of them look at the input
tokens, not at the targets.

With --eod_mask_loss, --loss_normalisation chooses how the mean loss is taken. `global` averages over the counted tokens
of the whole global batch. `micro` first averages within each micro-batch, as Megatron-LLM does, so the result depends
on the size of the micro-batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megatron_llm.data.manifest import Manifest
from megatron_llm.flags.arguments import DataFlags
from run_contract.errors import InputsMissing, UserError

FLAGS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")
GLOBAL, MICRO = "global", "micro"
"""The values that --loss_normalisation may have."""


@dataclass(frozen=True)
class Masks:
    """Which of the three flags are set, the token that ends a document, and how the loss is normalised."""

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    eod: int = -1
    loss_normalisation: str = GLOBAL

    @property
    def over_global_batch(self) -> bool:
        """Whether the loss of a micro-batch depends on the number of counted tokens in the whole global batch."""
        return self.eod_mask_loss and self.loss_normalisation == GLOBAL

    @classmethod
    def of(cls, flags: DataFlags) -> Masks:
        """The masks that the flags ask for, with the EOD token from the data's manifests.

        Raises UserError, InputsMissing.
        """
        asked = {name: getattr(flags, name) for name in FLAGS}
        if not any(asked.values()):
            return cls()
        said = " ".join(f"--{name}" for name, given in asked.items() if given)
        found: dict[int, str] = {}
        for prefix in flags.paths().prefixes():
            try:
                manifest = Manifest.read(prefix)
            except InputsMissing as error:
                raise InputsMissing(
                    f"{said}: the manifest of the data says which token ends a document, but {error}"
                ) from error
            if not manifest.append_eod:
                raise UserError(
                    f"{said}: no EOD token ends the documents of {prefix}; tokenise them with preprocess_data.py "
                    "--append_eod, or leave these flags out"
                )
            found[manifest.eod] = f"token {manifest.eod} in {prefix}"
        if len(found) > 1:
            raise UserError(
                f"{said}: documents end with {', '.join(found.values())}; tokenise all of them with one tokenizer "
                "and the same flags"
            )
        return cls(**asked, eod=next(iter(found)), loss_normalisation=flags.loss_normalisation or GLOBAL)

    def inputs(self, tokens: Tensor) -> dict[str, Tensor]:
        """The inputs that the model takes besides tokens (b, s), each (b, s), without those that no flag asks for.

        `positions` and `documents` (the number of each token's document within the sample) are int64; `counted`, which
        marks the tokens that count in the loss, is bool.
        """
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
        """The number of these input tokens that count in the loss."""
        return int((tokens != self.eod).sum()) if self.eod_mask_loss else tokens.numel()


NONE = Masks()


def with_normalisation(flags: DataFlags, saved: Mapping[str, Any]) -> DataFlags:
    """The flags with --loss_normalisation set: as given, else as in the run being continued, else `global`.

    saved: the state.json of the checkpoint being continued, or an empty mapping. Runs that began before the flag
    existed used `micro`. Raises UserError when the flag would change what a run with --eod_mask_loss learns.
    """
    asked = flags.loss_normalisation
    began: Any = asked or GLOBAL
    if saved and flags.eod_mask_loss:
        began = saved["arguments"].get("loss_normalisation", MICRO)
    if asked not in (None, began):
        raise UserError(
            f"--loss_normalisation {asked}: this run was trained with {began}; keep it so, or begin a new run from its "
            "checkpoint with --finetune and another --save folder"
        )
    return replace(flags, loss_normalisation=began)
