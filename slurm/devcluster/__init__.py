"""A real Slurm with several nodes on one machine, from the distribution's packages: for tests and rehearsals."""
