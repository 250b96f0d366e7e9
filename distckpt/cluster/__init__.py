"""For job scripts: the process group under mpirun or srun, and the check of the environment."""
