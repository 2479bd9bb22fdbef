#!/bin/bash -l
# Rendered by anthesis: change the run config or the cluster profile, not this script. The folder of
# its output has to be there before sbatch; `anthesis launch slurm` makes it.
@SBATCH@
@EXPORTS@
@SETUP@
cd @DIRECTORY@ || exit 2

# A task is a rank and reads its place from Slurm's variables. Before the time limit USR1 comes to
# the tasks: they save a checkpoint and end with code @STOPPED@.
srun @SRUN@ \
    @WORKER@
code=$?
@AFTER@
exit "$code"
