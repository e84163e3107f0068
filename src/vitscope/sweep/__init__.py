"""Sweeps: one W&B sweep file, run here without a server, or through W&B agents, or as a Hydra multirun.

``spec`` reads a file, ``draws`` and ``search`` propose trials, ``lint`` refuses what would break, ``local`` runs the
trials, ``halving`` stops the hopeless ones, ``agents`` leaves the choice to a W&B server, ``multirun`` starts the jobs
of ``train.py -m``.
"""
