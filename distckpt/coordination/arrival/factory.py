"""Choice of the role that a rank has in the protocol."""

from __future__ import annotations

from distckpt.coordination.arrival.captain import Captain
from distckpt.coordination.arrival.crew import Crew
from distckpt.coordination.arrival.member import Member
from distckpt.coordination.arrival.participant import ROOT, Arrival
from distckpt.coordination.arrival.root import Root
from distckpt.coordination.arrival.teams import Teams
from distckpt.coordination.channel import Channel


def arrival_over(channel: Channel, teams: Teams | None = None) -> Arrival:
    """Make this rank's role in the protocol. Local.

    Args:
        channel: This rank's channel.
        teams: The teams, the same on all ranks; None for those of `Teams.of`.
    """
    teams = teams or Teams.of(channel.size)
    captain = teams.captain_of(channel.rank)
    if channel.rank == ROOT:
        return Root(channel, teams)
    if captain == ROOT or len(teams.team_of(captain)) == 1:
        return Member(channel, teams)
    return Captain(channel, teams) if channel.rank == captain else Crew(channel, teams)
