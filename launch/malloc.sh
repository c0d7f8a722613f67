# How glibc's malloc is set for training: read by launch/*.sh, launch/slurm/train.sbatch and the Makefile.
# The environment's own values win.
#
# glibc hands large blocks back to the kernel at once, and each page of the next one faults again. Kept instead, gathers
# of table rows are four times as fast and a training step on a CPU gains 7 to 11 % (2 cores, AMX). malloc reads these
# when a process starts, so the program cannot set them itself.
: "${MALLOC_TRIM_THRESHOLD_:=4294967296}"
: "${MALLOC_MMAP_THRESHOLD_:=4294967296}"
: "${MALLOC_TOP_PAD_:=268435456}"
export MALLOC_TRIM_THRESHOLD_ MALLOC_MMAP_THRESHOLD_ MALLOC_TOP_PAD_
