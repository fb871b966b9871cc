"""python Megatron-LLM/finetune.py --load DIR --save DIR --data_path PREFIX --train_iters N … (one process per rank)

Continues the pre-training of a language model. Every rank runs this command with RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT set by the launcher; without them it is a single process. A run that was stopped is
continued by running the same command again.

Exit codes: 0 the last iteration is done; 75 the state is saved, run the command again; 76 the state is saved, and the
run was stopped by a file `stop` in --save; 74 the disk is full; 3 inputs are missing; 2 the user has made a mistake; 1
anything else. If standard output or standard error can no longer be written, the run is saved and ends with 74 (the
disk is full), 2 (writing is not permitted) or 1 (such as a reader that has gone).
"""

from __future__ import annotations

import os
import sys
import traceback
from typing import NoReturn

from megatron_llm.process import signals

if __name__ == "__main__":
    STOP = signals.install()  # before torch is imported, which takes seconds: an early signal must not be lost


def main(argv: list[str], stop: signals.StopRequest) -> int:
    """Parse the flags, join the other ranks, and train. Returns the exit code."""
    import torch

    from megatron_llm.flags import parser as flags_parser
    from megatron_llm.parallel import layout_checks
    from megatron_llm.parallel import world as parallel
    from megatron_llm.process import host_memory
    from megatron_llm.training import assemble

    args = flags_parser.parse(argv)
    layout_checks.batch_layout(args.parallel, args.training, parallel.world_size_in_environment())
    torch.set_num_threads(args.precision.threads)
    sizes = args.parallel.tensor_model_parallel_size, args.parallel.pipeline_model_parallel_size
    world = parallel.start(*sizes, args.parallel.distributed_timeout_minutes)
    if world.device.type == "cpu":
        host_memory.keep_freed()
    return assemble.run(args, world, stop)


def exit_code(argv: list[str], stop: signals.StopRequest) -> int:
    """Run the training, and turn errors into exit codes; only rank 0 prints an error that all ranks have alike."""
    from megatron_llm.optim.update_guards import Diverged
    from megatron_llm.process.errors import REPORTED_ERRORS
    from run_contract.errors import UserError, exit_code_of

    try:
        return main(argv, stop)
    except (*REPORTED_ERRORS, Diverged) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        return exit_code_of(error) if isinstance(error, UserError) else 1
    except SystemExit as request:  # --help
        return int(request.code or 0)
    except BaseException:
        print(f"rank {os.environ.get('RANK', '0')} failed:", file=sys.stderr)
        traceback.print_exc()
        return 1


def run(argv: list[str], stop: signals.StopRequest) -> NoReturn:
    """Train, and end this process in any case."""
    code = 1
    try:
        code = exit_code(argv, stop)
    finally:
        signals.leave(code)


if __name__ == "__main__":
    run(sys.argv[1:], STOP)
