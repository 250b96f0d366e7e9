"""`distckpt bench plan`: virtual ranks are merged as real ones are, and every byte is one of a real message."""

from __future__ import annotations

import importlib.util
import json
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from distckpt.bench.scale.ranks import VirtualRanks, VirtualSession
from distckpt.bench.scale.report import describe_growth
from distckpt.bench.scale.simulation import Simulation, manifest_of, open_manifest, plan_reads, simulate
from distckpt.bench.scale.virtual import LAYOUTS, Job, Stage, layouts_of
from distckpt.cli.main import build
from distckpt.coordination.arrival import Teams
from distckpt.coordination.coordinator import Coordinator
from distckpt.coordination.merging import Parts
from distckpt.coordination.message import Kind, Message, encode
from distckpt.layout.box import Box
from distckpt.layout.merge import merge
from distckpt.layout.records import SavePlan
from distckpt.layout.validation import validate_shards
from distckpt.source import Found
from distckpt.storage import manifest as manifests
from distckpt.wire import balance_of, decode_reply, encode_message, weights_of

VARIABLES = 47  # one full cycle of parameters, and a remainder


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ranks", [16, 64])
def test_virtual_ranks_merge_as_real_ones(layout: str, ranks: int) -> None:
    job = Job(ranks, VARIABLES, layout)
    simulation = Simulation(job)
    merged = simulation.first_save()
    expected = merge(list(layouts_of(job)))
    assert merged.variables == expected.variables
    assert merged.object_graph == expected.object_graph
    assert len(merged.variables) == VARIABLES
    assert not [problem for variable in merged.variables for problem in validate_shards(variable)]
    assert [decode_reply(reply) for reply in simulation.ranks.replies()] == expected.plans


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_real_messages(layout: str) -> None:
    job = Job(16, VARIABLES, layout)
    simulation = Simulation(job)
    simulation.first_save()
    request = simulation.request.encode()
    messages = [encode_message(request, holding) for holding in layouts_of(job)]
    others = job.ranks - 1
    # Beside the messages: a header of 32 bytes, and whether there is memory for them, for the replies, for common ones.
    framing = simulation.ranks.sent - sum(len(message.own) for message in messages[1:])
    graphs = {message.common for message in messages} - {messages[0].common}
    assert framing == others * (32 + 3) + sum(map(len, graphs))
    replies = list(simulation.ranks.replies())[1:]
    commons = sum(map(len, {reply.common for reply in [*simulation.ranks.replies()]}))
    expected = sum(len(reply.own) for reply in replies) + others * commons
    assert 0 < simulation.ranks.received - expected < others * 5000


def test_what_most_ranks_have_alike_travels_once() -> None:
    simulation = Simulation(Job(64, VARIABLES, "fsdp"))
    simulation.first_save()
    graph = next(simulation.messages()).common
    assert simulation.ranks.sent < 63 * len(graph)


def test_what_few_ranks_have_alike_is_not_told_to_all() -> None:
    ranks = VirtualRanks(64)
    # Half of the ranks are alike, four others are, and the rest is not.
    commons = [b"%d" % (0 if rank < 32 else 1 if rank < 36 else rank) * 5000 for rank in range(64)]
    ranks.values = lambda: iter([Parts(common, b"own") for common in commons])
    ranks.merge(Coordinator.over(VirtualSession(ranks)), "layout", lambda values: values)
    assert [reply.common for reply in ranks.replies()] == commons
    told_all = 63 * (len(commons[0]) + len(commons[32]))
    told_some = sum(map(len, commons[36:]))
    assert told_all + told_some < ranks.received < told_all + told_some + 63 * 6000


def test_an_unchanged_save_exchanges_four_messages_per_rank() -> None:
    simulation = Simulation(Job(16, VARIABLES, "fsdp"))
    simulation.first_save()
    simulation.prepare_unchanged_save()
    assert simulation.unchanged_save()
    arrive = encode(Message(Kind.ARRIVE, 1, 0, digest=1, balance=1), 16)
    others = [encode(Message(kind, 1, 0), 16) for kind in (Kind.GO, Kind.CONFIRM, Kind.START)]
    assert simulation.session.nbytes == 15 * sum(map(len, [arrive, *others]))
    assert simulation.session.nbytes <= 15 * 64


def test_teams_add_little_to_that() -> None:
    simulation = Simulation(Job(64, VARIABLES, "fsdp"))
    simulation.first_save()
    simulation.prepare_unchanged_save()
    assert simulation.unchanged_save()
    captains = 64 // Teams.of(64).span - 1
    assert simulation.session.nbytes == 63 * 52 + captains * 5
    assert simulation.session.seconds > 0.0


@pytest.mark.parametrize("rank", [0, 3, 15, 40, 63])
@pytest.mark.parametrize("wrong", ["layout", "replica"])
def test_an_unchanged_save_finds_what_changed_on_one_rank(wrong: str, rank: int) -> None:
    session = VirtualSession(VirtualRanks(16 if rank < 16 else 64))
    session.brought = [(7, 0)] * session.size
    assert session.meets()
    session.brought[rank] = (8, 0) if wrong == "layout" else (7, 1)
    assert not session.meets()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_keys_are_those_of_the_merge(layout: str) -> None:
    job = Job(16, VARIABLES, layout)
    merged = merge(list(layouts_of(job)))
    for number in range(job.stages):
        stage = Stage(job, number)
        plan: SavePlan = merged.plans[stage.ranks[-1]]
        assert plan.keys == ["step", *stage.keys]


def test_ranks_of_the_restore_find_all_they_hold() -> None:
    job = Job(16, VARIABLES, "tp")
    opened = open_manifest(manifests.encode(manifest_of(merge(list(layouts_of(job))), job.ranks)))
    found = msgspec.msgpack.encode(Found.of(opened))
    stage = Stage(Job(8, VARIABLES, "tp"), 0)
    variables = {variable.key: variable for variable in opened.manifest.variables}
    (key, boxes) = stage.keys[1], stage.boxes(3)[1]  # a column-parallel weight
    touched = [s for s in variables[key].shards if Box(s.offset, s.shape).intersect(boxes[0])]
    assert plan_reads(found, [key], [boxes]) >= len(touched) >= 2
    assert plan_reads(found, stage.keys, stage.boxes(3)) >= len(stage.keys)


def test_balances_of_virtual_ranks_add_up() -> None:
    job = Job(16, VARIABLES, "hsdp")
    simulation = Simulation(job)
    simulation.first_save()
    plans = [decode_reply(reply) for reply in simulation.ranks.replies()]
    balances = [balance_of(held, weights_of(plan)) for held, plan in zip(layouts_of(job), plans, strict=True)]
    assert any(balances)
    assert sum(balances) % 2**64 == 0


def test_costs_and_steps() -> None:
    steps: list[str] = []
    cost = simulate(Job(16, VARIABLES, "fsdp"), steps.append)
    assert steps[:2] == ["first save, messages of all ranks", "first save, merge and plan"]
    assert steps[-1] == "restore, plan of rank 7"
    assert (cost.ranks, cost.restore_ranks, cost.variables) == (16, 8, VARIABLES)
    assert cost.broadcast_nbytes > cost.manifest_nbytes > 0
    assert cost.shards > VARIABLES


def test_growth_is_that_between_the_last_two_sizes() -> None:
    cost = simulate(Job(16, VARIABLES, "fsdp"))
    sizes = [
        replace(cost, ranks=16, merge_seconds=1.0, merge_nbytes=500),
        replace(cost, ranks=64, merge_seconds=2.0, merge_nbytes=1000),
        replace(cost, ranks=256, merge_seconds=8.0, merge_nbytes=2000),
    ]
    assert describe_growth(sizes) == (
        "From 64 to 256 ranks the time of a first save grows as ranks ^ 1.00, its memory as ranks ^ 0.50."
    )
    assert describe_growth(sizes[:1]) == ""


def test_the_command_prints_a_row_per_size(tmp_path: Path) -> None:
    report, picture = tmp_path / "report.json", tmp_path / "growth.png"
    drawn = importlib.util.find_spec("matplotlib") is not None
    options = ["--ranks", "64", "--variables", "40", "--json", str(report)]
    result = CliRunner().invoke(
        build(["bench"]), ["bench", "plan", *options, *(["--plot", str(picture)] if drawn else [])]
    )
    assert result.exit_code == 0, result.output
    assert [row["ranks"] for row in json.loads(report.read_text())] == [16, 64]
    assert picture.exists() == drawn
    assert "unchanged" in result.output
    assert "From 16 to 64 ranks" in result.output


def test_the_command_leaves_fewer_ranks_out_when_asked(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ["--ranks", "32", "--variables", "40", "--no-growth", "--json", str(report)]
    result = CliRunner().invoke(build(["bench"]), ["bench", "plan", *options])
    assert result.exit_code == 0, result.output
    assert [row["ranks"] for row in json.loads(report.read_text())] == [32]
    assert "grows" not in result.output


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--layout", "ddp"], "expected one of fsdp, hsdp, tp, pp"),
        (["--json", "/no/such/place/x.json"], "its directory does not exist"),
        (["--ranks", "1"], "greater than or equal to 2"),
    ],
)
def test_bad_options(options: list[str], complaint: str) -> None:
    result = CliRunner().invoke(build(["bench"]), ["bench", "plan", *options])
    assert result.exit_code == 2
    assert complaint in " ".join(result.output.replace("│", "").split())


def test_bench_alone_still_needs_a_directory() -> None:
    result = CliRunner().invoke(build(["bench"]), ["bench", "--size", "1MiB"])
    assert result.exit_code == 2
    assert "--dir" in result.output


def test_arrivals_of_many_ranks_take_linear_time() -> None:
    ranks = 16384
    session = VirtualSession(VirtualRanks(ranks))
    session.brought = [(1, 0)] * ranks
    start = time.process_time()
    assert session.meets()
    assert time.process_time() - start < 4  # 0.5 s here, for 128 captains; rank 0 alone takes as long without them
    assert session.seconds < 0.1  # 0.01 s here
