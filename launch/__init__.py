"""Starting runs on a SLURM cluster or on this machine, and keeping them going."""
