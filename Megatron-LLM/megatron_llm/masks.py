"""Documents within a sample: where positions begin again, what attention sees, which tokens count in the loss.

A document ends with its EOD, which still belongs to it; what follows is the next one. As Megatron's
--reset_position_ids, --reset_attention_mask and --eod_mask_loss have it, which all look at the input tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_llm.arguments import Arguments
from megatron_llm.files import InputsMissing, UserError
from megatron_llm.manifest import Manifest

FLAGS = ("reset_position_ids", "reset_attention_mask", "eod_mask_loss")


@dataclass(frozen=True)
class Masks:
    """Which of the three are asked for, and the token that ends a document."""

    reset_position_ids: bool = False
    reset_attention_mask: bool = False
    eod_mask_loss: bool = False
    eod: int = -1

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
        return cls(**asked, eod=next(iter(found)))

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


NONE = Masks()
