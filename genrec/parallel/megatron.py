"""All that genrec uses of Megatron-Core: process groups, tensor-parallel linears, data parallel on CUDA.

Only this module's three parts import it, where something needs it, and from its public names. With a tensor-parallel
size of 1 and torch's data parallel it need not be installed: the groups are then the world and each rank by itself.
"""

from genrec.parallel._data_parallel import (
    DistributedAdamW,
    MegatronDataParallel,
    distribute_optimizer,
    distributed_parts,
    wrap_data_parallel,
)
from genrec.parallel._groups import (
    DENSE,
    check_sizes,
    data_parallel_group,
    data_parallel_rank,
    data_parallel_size,
    destroy,
    initialize,
    is_initialized,
    require_megatron,
    tensor_parallel_group,
    tensor_parallel_rank,
    tensor_parallel_size,
)
from genrec.parallel._linears import column_parallel, row_parallel, shard

__all__ = [
    "DENSE",
    "DistributedAdamW",
    "MegatronDataParallel",
    "check_sizes",
    "column_parallel",
    "data_parallel_group",
    "data_parallel_rank",
    "data_parallel_size",
    "destroy",
    "distribute_optimizer",
    "distributed_parts",
    "initialize",
    "is_initialized",
    "require_megatron",
    "row_parallel",
    "shard",
    "tensor_parallel_group",
    "tensor_parallel_rank",
    "tensor_parallel_size",
    "wrap_data_parallel",
]
