"""`distckpt bench plan`: what agreeing and planning cost with many ranks, simulated in one process without MPI."""
