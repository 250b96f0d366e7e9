"""`distckpt bench plan`: the cost of agreement and planning with many ranks, simulated in one process without MPI."""
