"""The only room that speaks MPI: arrival of the ranks, agreed steps, work on rank 0.

From top to bottom: `coordinator` (the verbs) > `session` (what coordinators over one communicator share) > `arrival`
(who is here, and does everybody agree) > `channel` and `message` (short messages). Beside them `collectives` (bytes and
arrays), `merging` (values to rank 0, replies back), `outcome` and `agreement` (which error all ranks raise), `nodes`
and `shared_memory` (which ranks share a node), `background` and `polled` (a thread that goes on with a collective
operation), `interrupts` (Ctrl-C), `job_end` (MPI_Abort), `checks` (of MPI and the communicator) and `launcher` (how
many processes were started).
"""
