"""Sweeps: one W&B sweep file, run here without a server, or through W&B agents, or as a Hydra multirun.

`sweep_file` reads a file, `distributions` and `search_algorithms` propose trials, `lint` refuses what would break,
`job_scheduler` runs jobs side by side, `local_runner` runs the trials on it, `early_termination` stops the hopeless ones,
`progress_table` and `trial_ranking` show them, `wandb_agents` leaves the choice to a W&B server, `hydra_multirun` starts the
jobs of ``train.py -m``.
"""
