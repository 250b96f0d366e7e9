"""distckpt: distributed checkpoints of PyTorch training, one parallel-HDF5 file per save."""

from distckpt.checkpoint import Checkpoint
from distckpt.cluster.sampler import ElasticSampler
from distckpt.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    CheckpointWarning,
    CollectiveError,
    CorruptCheckpointError,
    LayoutError,
    RankTimeoutError,
    RestoreMismatchError,
)
from distckpt.follow import checkpoints_iterator
from distckpt.graph.trackable import (
    NoDependency,
    PerRank,
    PythonState,
    RNGState,
    ShardedVariable,
    Trackable,
)
from distckpt.handle import SaveHandle
from distckpt.manager import CheckpointManager
from distckpt.options import RestoreOptions, SaveOptions
from distckpt.reader import CheckpointReader, list_variables, load_checkpoint, load_variable
from distckpt.restoring.status import RestoreStatus
from distckpt.retention import CheckpointRecord
from distckpt.storage.latest import latest_checkpoint

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "CheckpointManager",
    "CheckpointNotFoundError",
    "CheckpointReader",
    "CheckpointRecord",
    "CheckpointWarning",
    "CollectiveError",
    "CorruptCheckpointError",
    "ElasticSampler",
    "LayoutError",
    "NoDependency",
    "PerRank",
    "PythonState",
    "RNGState",
    "RankTimeoutError",
    "RestoreMismatchError",
    "RestoreOptions",
    "RestoreStatus",
    "SaveHandle",
    "SaveOptions",
    "ShardedVariable",
    "Trackable",
    "checkpoints_iterator",
    "latest_checkpoint",
    "list_variables",
    "load_checkpoint",
    "load_variable",
]
