"""Pipeline parallelism."""

from __future__ import annotations

from megatron_llm.arguments import Arguments
from megatron_llm.model import Part
from megatron_llm.model_config import ModelConfig
from megatron_llm.parallel import World


def parts(config: ModelConfig, args: Arguments, world: World) -> list[Part]:
    """This rank's stages in the order of their layers: every pp-th one."""
    size, rank = args.pipeline_model_parallel_size, world.mesh.get_local_rank("pp")
    depth = args.num_layers_per_virtual_pipeline_stage or config.num_layers // size
    stages = config.num_layers // depth
    return [
        Part(range(stage * depth, (stage + 1) * depth), first=stage == 0, last=stage == stages - 1)
        for stage in range(rank, stages, size)
    ]
