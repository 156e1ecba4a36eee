"""Starts jobs through nemo-run: on this machine, on a Slurm cluster, or elsewhere.

A job (`jobs.py`) is `torchrun -m megatron_precision COMMAND --config FILE`. `local.py` runs it on
this machine, `slurm.py` submits it to a cluster and `slurm_watch.py` follows it there, and
`elsewhere.py` gives it to Docker, Kubeflow or SkyPilot. `options.py` checks the options of
`launch.py`, with a site's defaults from `site.py`; `mounts.py` has the folders of a container.
`rank.py` is the other end: what each process of a job does around its work.

nemo-run takes seconds to import, so it is imported when a job starts and not before.
"""
