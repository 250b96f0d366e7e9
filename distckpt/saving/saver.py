"""The steps of a save: capture, agree, create, write, commit. In the background, a thread goes on from a copy."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

from distckpt.coordination.background import Background, background_of
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts
from distckpt.errors import LayoutError
from distckpt.graph.capture import Capture, capture
from distckpt.graph.memory import shared_memory_warnings
from distckpt.graph.view import LiveGraph
from distckpt.layout.collector import collector_off
from distckpt.log import warn
from distckpt.options import SaveOptions
from distckpt.request import Attempt, digest_of, encode_metadata
from distckpt.saving.agreed_layout import AgreedLayout
from distckpt.saving.background_save import BackgroundSave, Epilogue, OnCommit
from distckpt.saving.draft import NewFile, log_saved
from distckpt.saving.in_flight import InFlight
from distckpt.saving.output import Output, Target
from distckpt.saving.overlap import deferral_of, protect
from distckpt.saving.save_call import SaveCall, SaveResult
from distckpt.saving.writer import Destination, write_shards
from distckpt.storage.paths import from_here
from distckpt.storage.snapshot import Snapshot
from distckpt.storage.staging import HostBuffers
from distckpt.timing import AGREE, Timing
from distckpt.wire import balance_of, decode_reply, encode_message, encode_replies, merge_messages, weights_of


class Saver:
    """The saves of one Checkpoint.

    Attributes:
        in_flight: The saves in the background.
    """

    def __init__(self, coordinator: Coordinator, on_told: Callable[[], None]) -> None:
        """Local.

        Args:
            coordinator: Coordinator of the ranks that save.
            on_told: Called on every rank when rank 0 knows which waiting values the save replaces.
        """
        self._coordinator = coordinator
        self._on_told = on_told
        self._agreed: dict[str, AgreedLayout] = {}  # by family of operations
        self._buffers = HostBuffers()
        self.in_flight = InFlight(coordinator)
        self._outputs: dict[str, Output] = {}
        self._warned: set[str] = set()

    def save(self, operation: str, walk: Callable[[], LiveGraph], target: Target, options: SaveOptions) -> SaveResult:
        """See `Checkpoint.save` and `Checkpoint.write`. Collective over the communicator; no save is in flight."""
        with collector_off():  # around the locals of the call, too: what is freed before the end is never visited
            return self._save(SaveCall(operation, walk, target, options))

    def _save(self, call: SaveCall) -> SaveResult:
        coordinator, timer = self._coordinator, call.timer
        with coordinator.uninterrupted():
            captured, agreed = self._meet(call)
            output = self._output(call)
            try:
                file = self._create(call, output, agreed, captured)
                plan_jobs = functools.partial(agreed.jobs, file, captured)
                destination = Destination(file, agreed.aggregation, call.options, timer, file.temp_path)
                write_shards(coordinator, destination, plan_jobs, lambda: output.seal(timer.timing()))
                timer.collect(coordinator.gather_rows, ["fsync"])
                timing = coordinator.on_root("commit", lambda: self._commit(call, output), Timing)
            except BaseException:
                output.abandon()
                raise
            output.finish()
            if coordinator.rank == 0:
                log_saved(file, timing)
            return SaveResult(file.path, file.counter, timer.on_this_rank(timing))

    # ---- in the background ----

    def start(
        self,
        walk: Callable[[], LiveGraph],
        target: Target,
        options: SaveOptions,
        on_commit: OnCommit,
        epilogue: Epilogue | None,
    ) -> BackgroundSave:
        """See `Checkpoint.save_async`. Collective over the communicator; `in_flight` has room."""
        with collector_off():  # as for `save`
            return self._start(SaveCall("save_async", walk, target, options), on_commit, epilogue)

    def _start(self, call: SaveCall, on_commit: OnCommit, epilogue: Epilogue | None) -> BackgroundSave:
        coordinator, options = self._coordinator, call.options
        with coordinator.uninterrupted():
            captured, agreed = self._meet(call)
            output = self._output(call)
            try:
                background = background_of(coordinator)
                posix = replace(call, options=replace(options, transport="posix"))
                file = self._create(posix, output, agreed, captured, later=background.speaks)
                snapshot, temp_path = self._stage(call, background, file, agreed, captured)
            except BaseException:
                output.abandon()
                raise
            destination = Destination(file, agreed.aggregation, options, call.timer, temp_path)
            save = BackgroundSave(
                coordinator, background, destination, output.hand_over(), snapshot, on_commit, epilogue
            )
            protect(snapshot)
            self.in_flight.add(save)
            background.submit(save)
            return save

    def _stage(
        self, call: SaveCall, background: Background, file: NewFile, agreed: AgreedLayout, captured: Capture
    ) -> tuple[Snapshot, str]:
        """Copy what this rank writes; and where its thread finds the file, whose path may be relative. Collective."""
        options = call.options
        made: list[Snapshot] = []  # here, even where the step fails on another rank
        try:
            with self._coordinator.step("stage"), call.timer.step("stage"):
                background.require_running()
                temp_path = from_here(file.temp_path)
                jobs = agreed.jobs(file, captured)
                deferral = deferral_of(captured.graph, agreed.keys, overlap=options.overlap)
                later = [deferral.later[item.tensor] for item in agreed.plan.items]
                made.append(Snapshot(jobs, later, deferral.watch, self._buffers, options.host_memory))
        except BaseException:
            for snapshot in made:
                snapshot.release()
            raise
        return made[0], temp_path

    # ---- capture and agree ----

    def _meet(self, call: SaveCall) -> tuple[Capture, AgreedLayout]:
        """Walk, and agree with the other ranks on what is saved. Collective."""
        request = Attempt.of(call.request().encode)
        captured = Attempt.of(lambda: self._capture(call, request))
        agreed = self._agree(call, request, captured)
        return captured.value, agreed

    def _capture(self, call: SaveCall, request: Attempt[bytes]) -> Capture:
        """Walk and record this rank's objects. Local."""
        encode_metadata(call.options)
        request.require()
        if call.operation == "save_async" and call.options.transport == "mpio":
            raise LayoutError(
                "save_async: expected transport 'auto' or 'posix', for MPI-IO cannot be used beside the program. Got "
                "'mpio'. The file is the same."
            )
        with call.timer.step("walk"):
            graph = call.walk()
        with call.timer.step("digest"):
            return self._record(call, graph)

    def _record(self, call: SaveCall, graph: LiveGraph) -> Capture:
        """Record a walk. Where the layout is known, only the values that are compared get a fingerprint. Local."""
        agreed = self._agreed.get(call.family)
        whole = call.options.replicas == "check_all"
        if agreed is not None and len(agreed.weights) == graph.n_values:
            captured = capture(graph, hash_all=whole, skip=agreed.weights == 0)
            if agreed.has_layout(captured.layout, call.options):
                return captured
        return capture(graph, hash_all=whole, skip=None)

    def _agree(self, call: SaveCall, request: Attempt[bytes], captured: Attempt[Capture]) -> AgreedLayout:
        """Meet the other ranks; when anything changed anywhere, merge all layouts anew. Collective."""
        coordinator, options, timer = self._coordinator, call.options, call.timer
        agreed = self._agreed.get(call.family)
        digest = Attempt.of(lambda: _digest(agreed, request, captured, options))
        shared, balance = digest.result or (secrets.randbits(64), 0)
        with timer.step(AGREE):
            same = coordinator.arrive(call.operation, shared, balance, options.timeout)
        if same and digest.result is not None and agreed is not None:
            return agreed
        self._agreed.pop(call.family, None)  # whatever fails from here on, the next save agrees anew
        with coordinator.step("capture"):
            captured.require()
            digest.require()
            layout = captured.value.layout
            message = encode_message(request.value, layout)
        dropped: list[str] = []  # on rank 0, which warns once no rank tells it of them again
        reply = coordinator.merge_parts("layout", message, lambda messages: self._merge(call, messages, dropped))
        self._on_told()
        with coordinator.step("plan"), timer.step("plan"):
            warn(dropped)
            plan = decode_reply(reply)
            weights = weights_of(plan)
            keys = captured.value.tensor_keys(plan.keys)
            agreed = AgreedLayout(plan, layout, options.replicas, weights, keys)
            self.warn_once(*shared_memory_warnings(keys, [value.tensor for value in captured.value.tensors]))
        self._agreed[call.family] = agreed
        return agreed

    def _merge(self, call: SaveCall, messages: Sequence[Parts], dropped: list[str]) -> list[Parts]:
        """Merge the layouts of all ranks, and add to `dropped` what waiting values they replace. Rank 0 only."""
        with call.timer.step("merge"):
            merged = merge_messages(messages, trust_lowest=call.options.replicas == "first")
            self._output(call).adopt(merged)
            self.warn_once(*merged.warnings)
            dropped += merged.dropped
            return encode_replies(merged)

    def _output(self, call: SaveCall) -> Output:
        return self._outputs.setdefault(call.family, Output(numbered=call.family == "save"))

    def warn_once(self, *messages: str) -> None:
        """Warn on rank 0, each message once in the life of the Checkpoint. Local."""
        if self._coordinator.rank == 0:
            fresh = [message for message in messages if message not in self._warned]
            self._warned.update(fresh)
            warn(fresh)

    # ---- write ----

    def _create(
        self, call: SaveCall, output: Output, agreed: AgreedLayout, captured: Capture, *, later: bool = False
    ) -> NewFile:
        """Make the file on rank 0, or only describe it, and tell all ranks where its variables are. Collective."""
        make = functools.partial(self._make_file, call, output, agreed, captured, later=later)
        file = self._coordinator.on_root("create", make, NewFile)
        if file.fresh:
            agreed.place(self._coordinator.share(output.offsets))
            output.confirm()
        return file

    def _make_file(
        self, call: SaveCall, output: Output, agreed: AgreedLayout, captured: Capture, *, later: bool
    ) -> NewFile:
        """Make or describe the file. Rank 0 only."""
        with call.timer.step("create"):
            output.update_values(captured.python_values(agreed.plan.keys))
            return output.create(call.target, call.options, self._coordinator.size, later=later)

    def _commit(self, call: SaveCall, output: Output) -> Timing:
        """Commit the file. Rank 0 only. Ctrl-C comes before or after, not between the file and the state file."""
        with self._coordinator.uninterrupted(), call.timer.step("commit"):
            output.commit(call.options)
        call.timer.add_own("commit")
        return call.timer.timing()


def _digest(
    agreed: AgreedLayout | None, request: Attempt[bytes], captured: Attempt[Capture], options: SaveOptions
) -> tuple[int, int] | None:
    """What `arrive` compares to find that all is as agreed; None where this rank knows that it is not. Local."""
    if agreed is None or captured.error is not None:
        return None
    layout = captured.value.layout
    if not agreed.holds_for(layout, options):
        return None
    return digest_of(request.value) ^ agreed.plan.plan_id, balance_of(layout, agreed.weights)
