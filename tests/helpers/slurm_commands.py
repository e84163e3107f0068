"""Stand-ins for SLURM's commands: a job runs at once on this machine, as a node of its own."""

from __future__ import annotations

from pathlib import Path

_COMMANDS = {
    "sbatch": """
script="${@: -1}"
id=$((4242 + $(ls -1 "$SLURM_STAND_IN/jobs" 2>/dev/null | wc -l)))
mkdir -p "$SLURM_STAND_IN/jobs" "$SLURM_STAND_IN/scripts"
echo RUNNING > "$SLURM_STAND_IN/jobs/$id"
cp "$script" "$SLURM_STAND_IN/scripts/$id"
(
  export SLURM_JOB_ID=$id SLURM_NTASKS=1 SLURM_NNODES=1 SLURM_JOB_NUM_NODES=1 SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0
  export SLURM_JOB_NODELIST=node1 SLURMD_NODENAME=node1
  bash "$script" > "$SLURM_STAND_IN/output-$id" 2>&1
  echo COMPLETED > "$SLURM_STAND_IN/jobs/$id"
) > /dev/null 2>&1 &
echo "Submitted batch job $id"
""",
    "srun": """
while [[ "$1" == -* ]]; do if [[ "$1" == *=* || "$1" == --unbuffered ]]; then shift; else shift 2; fi; done
exec "$@"
""",
    "sacct": """
echo "JobID|State|NodeList"
for file in "$SLURM_STAND_IN"/jobs/*; do echo "$(basename "$file")|$(cat "$file")|node1"; done
""",
    "scancel": """
echo "$@" >> "$SLURM_STAND_IN/cancelled"
""",
}


def write(folder: Path) -> Path:
    """Write the commands into a folder, which ``PATH`` has to name; return it. ``SLURM_STAND_IN`` names a folder for jobs."""
    folder.mkdir()
    for name, text in _COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text.lstrip()}")
        (folder / name).chmod(0o755)
    return folder
