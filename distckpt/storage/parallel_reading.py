"""Reading with several threads: system calls and checksums of large boxes run in parallel.

A single thread copies from the page cache, and hashes, at the speed of one core, while the file systems of clusters
need several requests at once to reach their bandwidth.
"""

from __future__ import annotations

from collections.abc import Sequence

from distckpt.device import gpu_of
from distckpt.storage.reading import Reader, ReadReport, read
from distckpt.storage.room import Arrivals
from distckpt.storage.threads import LARGE_NBYTES, SHARE_NBYTES, one_at_a_time, share_out
from distckpt.storage.transfer import Progress, ReadJob
from distckpt.tensor_bytes import is_packed

#: Most buffers of all threads together, 48 MiB of memory. Each thread needs one for tensors on GPUs, and one for
#: tensors on the CPU that are not packed.
_MAX_WITH_BUFFER = 6


def read_in_threads(
    fd: int, jobs: Sequence[ReadJob], *, verify: bool, progress: Progress | None, threads: int
) -> ReadReport:
    """Read boxes into tensors. If `threads` is above 1, no two of the tensors may share memory.

    Args:
        fd: Descriptor of the file.
        jobs: The boxes and their tensors; fastest in file order.
        verify: Compare the checksums of jobs that have one.
        progress: Called with the number of bytes just put into tensors, by one thread at a time.
        threads: Most threads that read, including this one.

    Returns:
        The bytes read and verified.

    Raises:
        CorruptCheckpointError: As `storage.reading.read`.
    """
    large = [job for job in jobs if _is_large(job)] if threads > 1 else []
    threads = min(threads, _useful_threads(large))
    if threads < 2:
        return read(fd, jobs, verify=verify, progress=progress)
    small = [job for job in jobs if not _is_large(job)]
    gpus = {gpu for job in jobs if (gpu := gpu_of(job.tensor)) is not None}
    notify = one_at_a_time(progress)
    readers = [Reader(fd, Arrivals(gpus, n_buffers=1), verify, notify) for _ in range(threads)]
    share_out(small, large, [reader.read for reader in readers])
    return ReadReport(
        sum(reader.report.bytes_read for reader in readers), sum(reader.report.bytes_verified for reader in readers)
    )


def _useful_threads(large: Sequence[ReadJob]) -> int:
    """Number of threads for which there are enough bytes to read, and enough memory for buffers."""
    worth = sum(map(_nbytes, large)) // SHARE_NBYTES
    on_gpu = any(gpu_of(job.tensor) is not None for job in large)
    unpacked = any(gpu_of(job.tensor) is None and not is_packed(job.tensor) for job in large)
    n_buffers = on_gpu + unpacked
    return min(worth, _MAX_WITH_BUFFER // n_buffers) if n_buffers else worth


def _is_large(job: ReadJob) -> bool:
    return _nbytes(job) >= LARGE_NBYTES


def _nbytes(job: ReadJob) -> int:
    return job.tensor.numel() * job.tensor.element_size()
