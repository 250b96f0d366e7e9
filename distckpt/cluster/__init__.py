"""Tools for programs under mpirun or srun: process group, preemption, sampling, interval, check of the environment."""

from distckpt.cluster.preemption import EXIT_CODE, PreemptionGuard
from distckpt.cluster.process_group import init_process_group
from distckpt.cluster.sampler import ElasticSampler
from distckpt.cluster.walltime import find_deadline
from distckpt.interval import checkpoint_interval

__all__ = [
    "EXIT_CODE",
    "ElasticSampler",
    "PreemptionGuard",
    "checkpoint_interval",
    "find_deadline",
    "init_process_group",
]
