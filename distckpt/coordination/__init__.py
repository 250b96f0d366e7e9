"""Communication between ranks, the only package that calls MPI: arrival of the ranks, agreed steps, work on rank 0.

From top to bottom: `coordinator` (the public operations) > `session` (the state shared by coordinators over one
communicator) > `arrival` (all ranks meet and agree before a call starts) > `channel` and `message` (short messages).
Beside them: `collectives` (bytes and arrays), `merging` (values to rank 0, replies back), `outcome` and `agreement`
(the error that all ranks raise), `nodes` and `shared_memory` (ranks that share a node), `background` and `polled` (a
thread that goes on with a collective operation), `interrupts` (Ctrl-C), `job_end` (MPI_Abort), `checks` (of MPI and the
communicator) and `launcher` (the number of processes started).
"""
