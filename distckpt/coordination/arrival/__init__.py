"""Arrival: the ranks meet and agree before a collective call starts. The first exchange of every save and restore.

An MPI collective waits for ever for a rank that does not come, and cannot be cancelled. So the ranks first meet here,
with short messages, for which a rank can stop waiting: root (rank 0) waits until all have arrived, asks each once more,
and tells them to start only when all have confirmed. The steady state costs one exchange, which also tells whether the
ranks agree.

    member (every other rank)                        root
    -------------------------                        ----
    WAITING   -- ARRIVE(digest, balance) -->         GATHERING   until all are here
              <-- GO --
    CONFIRMED -- CONFIRM -->                         STARTING    until all have confirmed
              <-- START(verdict) --

A give-up ends in an error on all ranks that came, which names the same absent ranks:

    root's deadline        ABORT(absent) from root to all ranks.
    member's deadline      root did not come either. ROLL CALL: ROLL to all, answered by a ROLL to all from every rank
                           that waits; absent are those not heard within the grace.

`call` numbers keep messages of different calls apart, `generation` numbers those of different give-ups. A rank that
was away when the others gave up finds their ABORT or ROLL at its next call: the NOTICE. It cannot know whether the
others are in a newer call, so it waits for a second only, unless root tells it to WAIT.

The proof that calls never mix and no rank hangs rests on two facts. Only root decides a start, and only when every
rank has confirmed this very call; a rank may leave only before it confirms. And messages of one sender arrive in order.

Many ranks form TEAMS of about as many ranks as there are teams, so that no rank receives from more than a few hundred.
The lowest rank of a team is its captain, the others its crew. A captain gathers its crew as root gathers all ranks.
When all have confirmed, it is a member that speaks for the team, and passes on the answers of root.

    crew                         captain                                         root
    ----                         -------                                         ----
              -- ARRIVE -->      GATHERING  until all of the team are here
              <-- GO --
    LOCKED    -- CONFIRM -->     STARTING   until all of the team have confirmed
                                 WAITING    -- ARRIVE(digest, balance, team) -->
                                            <-- GO --
                                 CONFIRMED  -- CONFIRM -->
              <-- START --                  <-- START(verdict) --

A team takes part in a call only if its ranks come together. It is dissolved until the next call, and its ranks are
members like any other, if the captain is absent, if the team is not complete within the PATIENCE, or if one of its
ranks has a notice, hears of a roll call, or leaves. So root and the roll call always deal with whole teams and single
members, and find every absent rank themselves: a team hides none, as it has no absent ranks. The facts above hold: a
LOCKED rank may not leave by itself, but asks the captain, which dissolves the team unless it has confirmed itself; and
a captain that leaves or gives up dissolves the team, or tells it so.
"""

from distckpt.coordination.arrival.call import Call
from distckpt.coordination.arrival.factory import arrival_over
from distckpt.coordination.arrival.participant import ROOT, Arrival
from distckpt.coordination.arrival.teams import Teams

__all__ = ["ROOT", "Arrival", "Call", "Teams", "arrival_over"]
